"""Weight quantisation: schemes and their arithmetic, packs made from runtime weights, calibration, plans,
files.

`schemes` says how every scheme lies in memory: a kernel that reads packed weights is written against that
page.
"""

from graphopt.quantization import packing as packing
