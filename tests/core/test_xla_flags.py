"""XLA's flags: merged with what the user set, and effective."""

import pytest

from eejax.core.xla_flags import compiler_options, set_xla_flags

OPTION = "xla_cpu_small_while_loop_byte_threshold"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, f"--xla_backend_extra_options={OPTION}=0"),
        ("--xla_foo=1", f"--xla_foo=1 --xla_backend_extra_options={OPTION}=0"),
        ("--xla_backend_extra_options=a=1 --b=2", f"--xla_backend_extra_options={OPTION}=0,a=1 --b=2"),
        (f"--xla_backend_extra_options={OPTION}=7", f"--xla_backend_extra_options={OPTION}=7"),
    ],
)
def test_flags_are_added_to_those_that_are_set(before, after):
    environment = {} if before is None else {"XLA_FLAGS": before}
    set_xla_flags(environment)
    set_xla_flags(environment)
    assert environment == {"XLA_FLAGS": after}


def test_only_gpu_programs_are_compiled_otherwise():
    assert compiler_options("cpu") == {}
    assert compiler_options("gpu") == {"xla_disable_hlo_passes": "rematerialization"}
