"""The only folder that touches torch's private modules, so that a new torch is ported in one place."""

from graphopt._compat.cuda_graphs import (
    cuda_graphs as cuda_graphs,
)
from graphopt._compat.cuda_graphs import (
    incompatible_node as incompatible_node,
)
from graphopt._compat.cuda_graphs import (
    placeholder_facts as placeholder_facts,
)
from graphopt._compat.dynamo import (
    DynamoEvents as DynamoEvents,
)
from graphopt._compat.dynamo import (
    aot_input_index as aot_input_index,
)
from graphopt._compat.dynamo import (
    dynamo_source as dynamo_source,
)
from graphopt._compat.dynamo import (
    forgetter as forgetter,
)
from graphopt._compat.dynamo import (
    is_control_flow as is_control_flow,
)
from graphopt._compat.dynamo import (
    prepare_dynamo as prepare_dynamo,
)
from graphopt._compat.dynamo import (
    static_input_indices as static_input_indices,
)
from graphopt._compat.dynamo import (
    suggest_dynamic as suggest_dynamic,
)
from graphopt._compat.dynamo import (
    watching_dynamo as watching_dynamo,
)
from graphopt._compat.fakes import (
    SymbolFacts as SymbolFacts,
)
from graphopt._compat.fakes import (
    address as address,
)
from graphopt._compat.fakes import (
    fake_execution as fake_execution,
)
from graphopt._compat.fakes import (
    fake_mode_of as fake_mode_of,
)
from graphopt._compat.fakes import (
    fake_value as fake_value,
)
from graphopt._compat.fakes import (
    is_fake as is_fake,
)
from graphopt._compat.fakes import (
    lazy_graph_module as lazy_graph_module,
)
from graphopt._compat.fakes import (
    new_fake_execution as new_fake_execution,
)
from graphopt._compat.fakes import (
    placeholder_expression as placeholder_expression,
)
from graphopt._compat.fakes import (
    real_execution as real_execution,
)
from graphopt._compat.fakes import (
    speculative_execution as speculative_execution,
)
from graphopt._compat.fakes import (
    storage_holders as storage_holders,
)
from graphopt._compat.fakes import (
    symbol_facts as symbol_facts,
)
from graphopt._compat.fakes import (
    trace as trace,
)
from graphopt._compat.fakes import (
    without_modes as without_modes,
)
from graphopt._compat.inductor import (
    OutputCode as OutputCode,
)
from graphopt._compat.inductor import (
    aot as aot,
)
from graphopt._compat.inductor import (
    compile_caches as compile_caches,
)
from graphopt._compat.inductor import (
    force_stride_order as force_stride_order,
)
from graphopt._compat.inductor import (
    in_memory_format_of as in_memory_format_of,
)
from graphopt._compat.inductor import (
    inductor_calls as inductor_calls,
)
from graphopt._compat.inductor import (
    inductor_calls_function as inductor_calls_function,
)
from graphopt._compat.inductor import (
    inductor_compile as inductor_compile,
)
from graphopt._compat.inductor import (
    inductor_decompositions as inductor_decompositions,
)
from graphopt._compat.inductor import (
    inductor_generates as inductor_generates,
)
from graphopt._compat.inductor import (
    reload as reload,
)
from graphopt._compat.inductor import (
    storable as storable,
)
from graphopt._compat.onednn import (
    multiplies_fast as multiplies_fast,
)
