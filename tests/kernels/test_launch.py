"""What all Triton kernels have in common when they are launched (interpreted), and what is compiled once for all."""

from interpret import interpret

from kernels import attention, nf4


def test_interpreted():
    interpret("launch")


def test_tables_of_four_bits_are_copied_to_a_device_once():
    assert nf4.tables("cpu") is nf4.tables("cpu")


def test_a_stream_of_any_length_runs_the_kernel_that_was_checked():
    """Lengths differ from batch to batch: Triton would compile another kernel for those that 16 divides, and for 1; and for a
    group of one head, too."""
    for kernel in (attention._forward, attention._backward_q, attention._backward_kv):
        by_name = {p.name: p.do_not_specialize for p in kernel.params}
        assert by_name["N"] and by_name["M"] and by_name["g"]
