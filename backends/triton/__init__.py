"""Generated Triton kernels: fused regions of a captured graph become readable GPU source, checked without a GPU.

    region.py       one region: its sizes, strides and structural key
    expressions.py  the table from ATen operators to Triton expressions, with eager's dtype rules
    evaluate.py     the value of a node at an index, as lines of Triton
    gathers.py      reads at loaded indices
    scatters.py     writes at few loaded indices
    rows.py         the skeleton of elementwise and reduction regions
    reduction_split.py  few and very long rows shared out among programs
    matmul.py       the skeleton of matrix products, their prologues and epilogues
    matmul_split.py     long walks along k shared out among programs
    attention.py    the skeleton of attention
    attention_split.py  many keys shared out among programs
    helpers.py      the small device functions that kernels share
    source.py       the text of one kernel
    configs.py      what autotuning may choose from
    program.py      the whole graph as one Python file
    interpret.py    Triton's interpreter for one kernel, without an environment variable
    check.py        registers, spills and shared memory of a kernel, with no GPU
    compile.py      the entry: a graph becomes a callable
"""
