"""What only a GPU can tell, skipped where there is none: `python -m pytest tests/test_gpu.py`.

The numbers of every pipeline against those of the CPU, no host that waits within a loop, half precision,
compiled networks.
"""

import pytest
import torch
from test_devices import CASES, generate, made
from test_precision import BOUND, INPUTS, relative


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def full_digits():
    """Convolutions in float32, not in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_equals_that_of_the_cpu(name):
    """With the generators of the CPU, so that the draws are the same."""
    make, call = CASES[name]
    expected, pipe = made(generate(make(), call)), make().to("cuda")
    result = made(generate(pipe, call)).cpu()
    if result.is_floating_point():
        assert relative(result, expected) < 1e-3  # of the whole: the field divides by what may be next to nothing
    else:  # a draw at the edge of a token may fall to its other side, and change what is drawn after it
        assert (result == expected).double().mean() > 0.7


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits(name):
    make, call = CASES[name]
    pipe = make().to("cuda")
    steps, done = [], []
    generate(pipe, call, "cuda", lambda: steps.append(1))  # fewer than the scheduler has, with a strength

    def watch():
        done.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(done) < len(steps) else "default")

    try:
        generate(pipe, call, "cuda", watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_compile(name, dtype):
    model, inputs = INPUTS[name]()
    expected = model(*inputs).sample.detach()
    model, inputs = model.to("cuda"), [value.to("cuda") for value in inputs]
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs).sample.cpu(), expected, rtol=1e-3, atol=1e-3)
        with torch.autocast("cuda", dtype):
            assert 0 < relative(model(*inputs).sample.cpu(), expected) < BOUND
        compiled = torch.compile(model)(*inputs).sample.cpu()
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-3)
