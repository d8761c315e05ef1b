"""The kernels' helpers: several callers at the same time, and a process forked from one that has helpers."""

import os
import threading

import pytest
import torch

from fate.kernels import linear, native
from packed_records import matrix_layout, random_record

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")
LAYOUT = matrix_layout("int4", 512, 1024)


def call(record, x):
    return linear(x, record, LAYOUT)


def test_callers_at_the_same_time_get_their_own_results():
    record = random_record(LAYOUT)
    inputs = [torch.randn(3, 1024, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    torch.set_num_threads(1)
    expected = [call(record, x) for x in inputs]
    torch.set_num_threads(4)
    wrong = []

    def repeat(x, right):
        torch.set_num_threads(4)  # OpenMP keeps it for each thread
        for _ in range(200):
            if not torch.equal(call(record, x), right):
                wrong.append(1)

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking a process with threads, which is the point
def test_a_forked_process_computes_without_helpers():
    record, x = random_record(LAYOUT), torch.randn(3, 1024, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(4)
    expected = call(record, x)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(call(record, x), expected) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
