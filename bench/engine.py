"""The engine at SV3D's shapes on random weights, beside diffusers in one process: `python -m bench.engine`.

A guided step is 42 images of 72² latents in float16. Times are medians by CUDA events. With --compile diffusers is
timed under torch.compile too, which takes minutes to compile. Needs a GPU and diffusers.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from sv3d_fast.benchmark import step_flops
from sv3d_fast.ceilings import measure
from sv3d_fast.conditioning import Conditioning
from sv3d_fast.engine import decoding_frames, denoising
from sv3d_fast.events import finish
from sv3d_fast.full_size import randomised
from sv3d_fast.kernels.euler_step import euler_step
from sv3d_fast.kernels.temporal_attention import temporal_attention
from sv3d_fast.model.config import ModelConfig, SamplerConfig, UNetConfig, VAEConfig
from sv3d_fast.model.unet import SV3DUNet, sinusoidal
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.prediction import FusedPrediction, PlainPrediction, fused

from .engine_parts import op_table, waterfall
from .results import record

ISSUE = "engine"
FRAMES, SIDE, STEPS = 21, 72, 50
COND_AUG = 1e-5
# the u model with diffusers' epsilons: the stock class then computes the same function of the same weights
CONFIG = UNetConfig(vector_dim=256, norm_eps="diffusers")


def milliseconds(call: Callable[[], object], runs: int = 10) -> float:
    """Median of `runs` calls after two for warmth."""
    for _ in range(2):
        call()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def stock_unet(weights: dict[str, torch.Tensor], device: torch.device) -> torch.nn.Module:
    """diffusers' class with the same weights."""
    from diffusers import UNetSpatioTemporalConditionModel

    kinds = ["CrossAttn" if attention else "" for attention in CONFIG.attention]
    with torch.device("meta"):
        theirs = UNetSpatioTemporalConditionModel(
            block_out_channels=CONFIG.block_channels,
            down_block_types=tuple(f"{kind}DownBlockSpatioTemporal" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)),
            cross_attention_dim=CONFIG.context_dim,
            num_attention_heads=tuple(c // CONFIG.head_channels for c in CONFIG.block_channels),
            projection_class_embeddings_input_dim=256,
        )
    theirs.load_state_dict({k: v.contiguous() for k, v in weights.items()}, assign=True)
    return theirs.to(device).eval()


def gaps(replay: Callable[[], object]) -> float:
    """Share of a replay in which no kernel runs, from one traced replay."""
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        replay()
        torch.cuda.synchronize()
    kernels = [e for e in traced.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.time_range.elapsed_us() for e in kernels)
    whole = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
    return max(0.0, 1 - busy / whole)


def by_kernel(replay: Callable[[], object], rows: int = 14) -> None:
    """Prints where a step's time goes, by kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        replay()
        torch.cuda.synchronize()
    for row in sorted(traced.key_averages(), key=lambda r: -r.self_device_time_total)[:rows]:
        print(f"{row.self_device_time_total / 1e3:9.2f} ms {row.count:5d}  {row.key[:90]}")


@torch.no_grad()
def parts(unet: SV3DUNet, step: FusedPrediction, halves: list, noisy: torch.Tensor, level: float, ms: float) -> None:
    """Prints the step by op and by what each part of the engine gives, and checks that its sampling is one kernel."""
    ceilings = measure(noisy.device)
    print(f"copying {ceilings.copy / 1e12:.2f} TB/s, products {ceilings.product / 1e12:.0f} TFLOPS")
    rate = step_flops(ModelConfig(CONFIG)) / ms * 1e3
    print(f"step: {rate / 1e12:.0f} TFLOPS, {rate / ceilings.product:.0%} of products")
    plain = PlainPrediction(unet, halves, [level])
    plain_ms = milliseconds(lambda: plain(0, noisy), 3)

    def eager() -> torch.Tensor:
        return step.network(noisy, step.run.rows[0], step.run)

    print(op_table(eager, ms, milliseconds, ceilings))
    torch.cuda.empty_cache()
    print(waterfall(plain_ms, eager, ms, milliseconds))
    latents = noisy.float().movedim(-1, 2).contiguous()
    operands = step(0, noisy).unflatten(0, (2, -1)), latents, torch.ones(FRAMES, device=noisy.device), level, 1.0
    assert euler_step.choose(*operands).name == "triton"
    ours = milliseconds(lambda: euler_step(*operands))
    stock = milliseconds(lambda: euler_step(*operands, implementation="reference"))
    print(f"guidance, Euler's step and scaling: {1e3 * ours:.0f} us, in torch {1e3 * stock:.0f} us")


def unet_bench(device: torch.device, compiled: bool) -> None:
    """One guided step and a run of 50, against diffusers and the float32 reference."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    torch.manual_seed(0)
    with torch.device("meta"):
        unet = SV3DUNet(CONFIG)
    unet = randomised(unet, device, torch.float16)
    noise = draw(1, FRAMES, 4, SIDE, SIDE)
    vector = sinusoidal(torch.full((1, FRAMES), COND_AUG, device=device), 256)
    given = Conditioning(draw(1, 1, CONFIG.context_dim).half(), draw(1, 4, SIDE, SIDE).half(), vector)
    halves, level, config = [given.unconditional(), given], 1.4, SamplerConfig(steps=STEPS)

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step = FusedPrediction(fused(unet), halves, [level])
    noisy = noise.half().movedim(2, -1).contiguous()
    ours = step(0, noisy).movedim(-1, 2).clone()
    torch.cuda.synchronize()
    print(f"packed, compiled and captured in {time.perf_counter() - began:.1f} s")
    token = torch.cat([half.token for half in halves])
    images = torch.cat([half.image_latents for half in halves])[:, None].expand(-1, FRAMES, -1, -1, -1)
    inputs = torch.cat([noise.half().expand(2, -1, -1, -1, -1), images], 2)
    c_noise = 0.25 * torch.tensor(level, device=device).log()

    finish(denoising(unet, given, noise, SamplerConfig(steps=1)))  # compiles what only the sampler runs

    ours_ms = milliseconds(lambda: step(0, noisy))
    began = time.perf_counter()
    finish(denoising(unet, given, noise, config))
    torch.cuda.synchronize()
    run_s = time.perf_counter() - began
    peak = torch.cuda.max_memory_reserved() / 2**30  # a graph's own memory counts as allocated only while it is made
    record(ISSUE, "UNet, one guided step", ours_ms, "ms", "<= 135")
    record(ISSUE, "50 steps, conditioning to latents", run_s, "s", "<= 6.9")
    record(ISSUE, "peak memory, 576², 21 frames, network and step", peak, "GiB", "<= 7")
    assert step.step is not None
    record(ISSUE, "gaps between kernels in a step", 100 * gaps(step.step.graph.replay), "%", "<= 2")
    by_kernel(step.step.graph.replay)
    parts(unet, step, halves, noisy, level, ours_ms)

    theirs = stock_unet(unet.state_dict(), device)
    added = torch.full((2, 1), COND_AUG, dtype=torch.float16, device=device)

    with torch.no_grad():
        stock_ms = milliseconds(lambda: theirs(inputs, c_noise, token, added), 5)
        stock_out = theirs(inputs, c_noise, token, added).sample
        compiled_ms = None
        if compiled:
            for module in theirs.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.to(memory_format=torch.channels_last)
            faster = torch.compile(theirs)
            compiled_ms = milliseconds(lambda: faster(inputs, c_noise, token, added), 5)
        unet.float()
        expected = unet(inputs.float(), c_noise, token.float(), vector.expand(2, -1, -1))
    ours_error, stock_error = error(ours, expected), error(stock_out, expected)
    print(f"errors against float32: ours {ours_error:.3e}, diffusers float16 {stock_error:.3e}")
    print(f"diffusers eager {stock_ms:.1f} ms")
    record(ISSUE, "UNet, one guided step, of diffusers eager", ours_ms / stock_ms, "", "<= 0.45")
    if compiled_ms is not None:
        record(ISSUE, "UNet, one guided step, of diffusers compiled", ours_ms / compiled_ms, "", "<= 0.63")
    record(ISSUE, "error of a step, of diffusers float16 eager", ours_error / stock_error, "", "<= 1.2")


def temporal_attention_bench(device: torch.device) -> None:
    """The kernel at the finest level, beside SDPA with the copies that its layout needs."""
    qkv = torch.randn(2, FRAMES, SIDE * SIDE, 3 * 320, device=device, dtype=torch.float16)
    ms = milliseconds(lambda: temporal_attention(qkv, 5), 30)
    stock = milliseconds(lambda: temporal_attention(qkv, 5, implementation="sdpa"), 10)
    copied = torch.empty_like(qkv)
    copy_rate = 2 * qkv.nbytes / milliseconds(lambda: copied.copy_(qkv), 30)
    print(f"temporal attention: {ms:.3f} ms, SDPA with its copies {stock:.3f} ms")
    record(ISSUE, "temporal attention, 72²", ms, "ms", "<= 0.3")
    record(ISSUE, "temporal attention, 72², of copy bandwidth", 100 * qkv.nbytes * 4 / 3 / ms / copy_rate, "%", ">= 70")


def vae_bench(device: torch.device) -> None:
    """Decoding 21 frames to bytes in main memory, by precision (the command line's is float32) and chunk size."""
    latents = torch.randn(FRAMES, 4, SIDE, SIDE, device=device)
    best = None
    for dtype in (torch.float16, torch.float32):
        with torch.device("meta"):
            vae = SV3DVAE(VAEConfig())
        vae = randomised(vae, device, dtype).to(memory_format=torch.channels_last)
        for chunk in (1, 2, 3, 7):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ms = milliseconds(lambda vae=vae, chunk=chunk: finish(decoding_frames([vae], latents, chunk=chunk)), 3)
            beyond = (torch.cuda.max_memory_allocated() - before) / 2**30
            print(f"VAE decode, {dtype}, chunk {chunk}: {ms:.0f} ms, {beyond:.2f} GiB beyond weights")
            if best is None or (dtype == torch.float16 and beyond <= 1.5):
                best = (ms, beyond)
    record(ISSUE, "VAE decode, 21 frames, float16", best[0], "ms", "<= 190")
    record(ISSUE, "VAE decode, beyond weights", best[1], "GiB", "<= 1.5")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--compile", action="store_true", help="time diffusers under torch.compile too")
    args = parser.parse_args()
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), torch.__version__)
    temporal_attention_bench(device)
    vae_bench(device)
    torch.cuda.empty_cache()
    unet_bench(device, args.compile)


if __name__ == "__main__":
    main()
