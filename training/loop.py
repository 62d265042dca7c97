"""The training loop: optimizer steps with everything that keeps a long run alive and tells how it is doing."""

import json
import resource
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType, ProjectConfiguration, gather_object
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from tonefield.command_line import UserError, first_line
from tonefield.files import claim, tidy, write_text, writing
from tonefield.training.checkpoints import (
    CONTINUE,
    Best,
    Checkpoints,
    check_same_run,
    find_checkpoint,
    list_checkpoints,
)
from tonefield.training.data import Data, Shares
from tonefield.training.engines import DDP, FSDP, check_engine, read_launcher
from tonefield.training.interruption import REASONS, Interruption, interrupted
from tonefield.training.randomness import derive_seed, make_generators


# How long a process waits for the others. The first one alone encodes captions and makes samples meanwhile. (It need
# not wait for one that has ended: that closes its connections.)
PATIENCE = timedelta(hours=1)


def make_accelerator(args) -> Accelerator:
    """Accelerate as the flags describe it. The schedule advances once an optimizer step, whatever the processes."""
    engine, settings = read_launcher(args)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    tracker = args.report_to
    if tracker in LoggerType.list() and tracker not in ("all", *map(str, get_available_trackers())):
        raise UserError(f"--report_to {tracker}: its package is not installed. Install {tracker}, or leave this out.")
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if tracker == "none" else tracker,
            project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, "logs"))),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:  # a tracker that is unknown, or a precision that the device lacks
        raise UserError(first_line(error)) from None
    if (
        accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu"
    ):  # accelerate would compute in float32
        raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no.")
    if engine is FSDP and accelerator.num_processes == 1:  # there is nothing to divide
        engine, settings = DDP, {}
    accelerator.engine = engine, settings  # pyright: ignore[reportAttributeAccessIssue]
    if accelerator.is_main_process:
        if (lock := claim(Path(args.output_dir))) is not None:
            weakref.finalize(accelerator, lock.close)
        tidy(Path(args.output_dir))
    accelerator.wait_for_everyone()
    return accelerator


@dataclass
class Loss:
    """
    What `compute_loss` may return in place of a number.

    Args:
        total: What the network learns from.
        parts: Numbers to be logged beside it.
        opponent: What the opponent learns from; nothing in it may depend on the network's weights, nor `total` on the
            opponent's.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    opponent: torch.Tensor | None = None

    @staticmethod
    def of(loss: "torch.Tensor | Loss") -> "Loss":
        return loss if isinstance(loss, Loss) else Loss(loss)


@dataclass
class Opponent:
    """
    A second network that is trained beside the first and against it: the discriminator of a GAN.

    It is a second group of parameters of the same optimizer. Adam treats each parameter by itself, so this is what two
    optimizers would do, and there is one thing to save, one schedule and one loss scaler.

    Args:
        network: What `compute_loss` is given as its fourth argument, once it takes part.
        start: How many optimizer steps are done without it.
        settings: Of AdamW, where they differ from the flags: `{"lr": 1e-4}`.
        name: What to call its subfolder.
    """

    network: ModelMixin
    start: int
    settings: dict = field(default_factory=dict)
    name: str = "opponent"


class Average:
    """
    The moving average of a network's weights, kept in a second network that is at all times ready to be used. Weights
    that are not trained (those beside a LoRA) are there once, for both.

    diffusers' `EMAModel` does the arithmetic. Its own way to use an average is to overwrite the live weights for a
    while; here they are never touched.
    """

    def __init__(self, copied: torch.nn.Module, model: torch.nn.Module, args):
        self.network = copied.eval()
        averages = [value for value in self.network.parameters() if value.requires_grad]
        self.network.requires_grad_(False)
        self.ema = EMAModel(
            averages, decay=args.ema_max_decay, use_ema_warmup=True, inv_gamma=args.ema_inv_gamma,
            power=args.ema_power, foreach=True,
        )  # fmt: skip
        self.ema.shadow_params = averages
        self.live = [value for value in model.parameters() if value.requires_grad]

    def step(self) -> None:
        self.ema.step(self.live)


def memory_in_use() -> float:
    """The most memory that this process has held, in GiB: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Measurements:
    """
    Losses and gradient norms since they were last read. They stay on the device until then: reading a number makes the
    host wait for the device, and that happens once every `--logging_steps`, not once a step.
    """

    def __init__(self, accelerator: Accelerator, shares: Shares, data: Data):
        self.accelerator, self.shares, self.data = accelerator, shares, data
        self.start = time.monotonic()
        self.losses: list[torch.Tensor] = []
        self.parts: dict[str, list[torch.Tensor]] = {}
        self.norms: list[torch.Tensor] = []

    def add(self, loss: Loss) -> None:
        self.losses.append(loss.total.detach())
        for name, part in loss.parts.items():
            self.parts.setdefault(name, []).append(part.detach())

    def read(self, step: int, stop: int) -> tuple[dict[str, float], int]:
        """Means over all processes since the last reading, and why any of them wants to stop. `step` are done."""
        steps, micro = len(self.norms), self.shares.accumulation
        parts = [torch.stack(values).mean() for values in self.parts.values()]
        mine = torch.stack([*self.losses, *self.norms, *parts]).float()
        everyone = self.accelerator.gather(torch.cat([mine, mine.new_tensor([float(stop)])])[None]).cpu()
        losses = everyone[:, : steps * micro].reshape(-1, steps, micro)
        norms = everyone[:, steps * micro :][:, :steps]
        means = everyone[:, steps * micro + steps : -1].mean(dim=0).tolist()
        self._refuse_nonsense(losses, norms, step - steps)
        seconds = time.monotonic() - self.start
        values = {
            "loss": losses.mean().item(),
            **dict(zip(self.parts, means, strict=True)),
            "gradient_norm": norms.mean().item(),
            "samples_per_second": steps * self.shares.per_step / seconds,
            "seconds_per_step": seconds / steps,
            "memory_gib": memory_in_use(),
        }
        self.losses, self.parts, self.norms, self.start = [], {}, [], time.monotonic()
        return values, int(everyone[:, -1].max())

    def _refuse_nonsense(self, losses: torch.Tensor, norms: torch.Tensor, first: int) -> None:
        """Stops at the first loss or gradient that is no number. (fp16 skips gradients that overflow.)"""
        bad = ~losses.isfinite()
        bad_steps = bad.any(dim=2).any(dim=0)
        if self.accelerator.mixed_precision != "fp16":
            bad_steps |= ~norms.isfinite().all(dim=0)
        if not bad_steps.any():
            return
        offset = int(bad_steps.nonzero()[0])
        where = [(process, micro) for process, micro in bad[:, offset].nonzero().tolist()]
        what = f"The loss is {losses[:, offset][bad[:, offset]][0].item()}" if where else "The gradient is not finite"
        row_of = getattr(self.data.train, "row_of", lambda position: position)
        everywhere = [(p, m) for p in range(losses.shape[0]) for m in range(losses.shape[2])]
        rows = [row_of(p) for process, micro in where or everywhere
                for p in self.shares.positions(first + offset, micro, process)]  # fmt: skip
        raise UserError(
            f"{what} at step {first + offset + 1}, rows {', '.join(map(str, rows))} of the training data. The run"
            " stops here; the checkpoints are from before. A lower --learning_rate may help."
        )


def train(
    args,
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: Data,
    compute_loss: Callable[..., torch.Tensor | Loss],
    generate: Callable[[torch.nn.Module, int], dict[str, float] | None] | None = None,
    run: dict | None = None,
    name: str = "unet",
    validate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    opponent: Opponent | None = None,
    keep_best: bool = False,
) -> torch.nn.Module:
    """
    Trains `model` and returns what to publish. `Interrupted` is raised when a signal ended the run early.

    Args:
        args: The flags of `add_data_arguments` and `add_training_arguments`.
        compute_loss: The loss of a batch: of the network to call, the batch, and one generator per sample; of the
            opponent as well while that takes part.
        generate: Makes samples with a network after a number of steps, and may return numbers to report; called by
            the main process.
        run: What must be the same when the run is resumed.
        name: What to call the network's subfolder.
        validate: What to report of a network, `validation_loss` among it, instead of its loss over the held-out rows;
            every process calls it.
        opponent: A second network that learns against the first.
        keep_best: Publish the weights with the lowest validation loss, not the last ones, as with `--best_metric`,
            which may name another number that `validate` or `generate` reports. They are kept in `best`. Those from
            before the opponent took part are only kept until then.
    """
    device, folder = accelerator.device, Path(args.output_dir)
    run = data.describe() | (run or {})
    shares = Shares(
        args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes, accelerator.process_index
    )
    run["samples per step"] = shares.per_step
    found = find_checkpoint(args.resume_from_checkpoint, folder) if args.resume_from_checkpoint else None
    if found:
        check_same_run(found[1], run, found[0])
    elif not args.resume_from_checkpoint and list_checkpoints(folder):
        raise UserError(
            f"{folder} has checkpoints of an earlier run: continue it with --resume_from_checkpoint latest, or choose"
            " another --output_dir."
        )

    engine_type, settings = getattr(accelerator, "engine", (DDP, {}))
    check_engine(engine_type, accelerator.mixed_precision, model, opponent)
    model.to(device)
    engine = engine_type(accelerator, model, **settings)
    average = Average(engine.average_of(model), model, args) if args.use_ema else None
    networks = {name: model} | ({f"{name}_ema": average.network} if average else {})
    groups: list[dict] = [{"params": [value for value in model.parameters() if value.requires_grad]}]
    if opponent:
        networks[opponent.name] = opponent.network.to(device)
        groups.append({"params": list(opponent.network.parameters())} | opponent.settings)
    optimizer = torch.optim.AdamW(
        groups, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
        args.adam_weight_decay, fused=device.type == "cpu" or None,  # on a CPU in half the time
    )  # fmt: skip
    schedule = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    network, optimizer, schedule = engine.prepare(optimizer, schedule)
    trained = [network] + ([accelerator.prepare(opponent.network)] if opponent else [])
    checkpoints = Checkpoints(engine, folder, networks, args.checkpoints_total_limit)
    if engine_type is not DDP:
        accelerator.print(f"with {engine_type.__name__}, processes: {shares.num_processes}")

    step, stop, resume_at = 0, 0, None
    if found:
        path, state = found
        checkpoints.restore(path)
        step, places = state["step"], state["resume_at"] or [None]  # one of each process
        resume_at = places[min(shares.process, len(places) - 1)]
        if average:
            average.ema.optimization_step = state["ema_step"]
        if accelerator.is_main_process:
            checkpoints.prune(step)  # the run before may have been stopped while it did
        accelerator.print(f"continuing from {path}, step {step}")
    if args.report_to != "none":
        flags = {name: value for name, value in vars(args).items() if value is not None}
        plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in flags.items()}
        accelerator.init_trackers(args.tracker_project_name, plain)

    def save() -> None:
        ema_step = average.ema.optimization_step if average else 0
        checkpoints.save(step, {"resume_at": gather_object([resume_at]), "ema_step": ema_step, "run": run})

    def report(values: dict[str, float]) -> None:
        accelerator.log(values, step=step)
        if accelerator.is_main_process:
            with writing(folder / "metrics.jsonl", CONTINUE), (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            if args.test or not sys.stderr.isatty():
                tqdm.write(f"step {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))

    def result() -> torch.nn.Module:
        """What would be published now."""
        network = average.network if average else model
        return engine.whole(network)

    best = None
    if (keep_best or args.best_metric) and accelerator.is_main_process:
        best = Best(folder, name, found is None, f"validation_{args.best_metric or 'loss'}")

    def due() -> bool:
        """Whether a validation follows this step."""
        return args.validation_steps > 0 and (step % args.validation_steps == 0 or step == args.max_train_steps)

    def check() -> None:
        now = result()
        if validate is None:
            losses = validation_losses(args, accelerator, now, data, compute_loss)
        else:
            losses = validate(now)
        report(losses)
        if generate is not None and accelerator.is_main_process and (values := generate(now, step)):
            report(values)
            losses = losses | values
        if best is not None:
            stage = 0 if opponent is None else int(step > opponent.start)
            best.offer(now, losses[best.metric], step, stage)
        accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        cut_metrics(folder / "metrics.jsonl", step, due())
    if found and due():  # whether the run before came to it is not known
        check()
    measurements = Measurements(accelerator, shares, data)
    batches = iter(data.train.batches(shares, step, args.dataloader_num_workers, resume_at))
    bar = tqdm(total=args.max_train_steps, initial=step, unit="step", disable=not accelerator.is_main_process or None)
    network.train()
    with Interruption(args.max_hours, accelerator.is_local_main_process) as interruption:
        while step < args.max_train_steps:
            playing = trained[1:] if opponent and step >= opponent.start else []
            for _ in range(shares.accumulation):
                batch = next(batches)
                positions, resume_at = batch["positions"], batch.get("resume_at")
                batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
                torch.manual_seed(derive_seed(args.seed, "dropout", positions[0]))
                with engine.accumulate(trained):
                    generators = make_generators(args.seed, "noise", positions, device)
                    loss = Loss.of(compute_loss(network, batch, generators, *playing))
                    engine.backward(loss.total if loss.opponent is None else loss.total + loss.opponent)
                    measurements.add(loss)
                    norm = engine.update([network, *playing], optimizer, args.max_grad_norm)
                    if norm is not None:
                        measurements.norms.append(norm)
            schedule.step()
            if average:
                average.step()
            step += 1
            bar.update()

            # Processes agree to stop when they read the loss anyway. One alone need not wait until then.
            stop = interruption.due()
            saving = step % args.checkpointing_steps == 0 or step == args.max_train_steps
            validating = due()
            alone = accelerator.num_processes == 1
            if step % args.logging_steps == 0 or saving or validating or (stop and alone):
                values, stop = measurements.read(step, stop)
                bar.set_postfix(loss=f"{values['loss']:.4g}")
                report(values | {"learning_rate": schedule.get_last_lr()[0]})
                if saving or stop:
                    save()
                if stop:
                    break
                if validating:
                    check()
                    network.train()
                measurements.start = time.monotonic()
    bar.close()
    if step < args.max_train_steps:
        accelerator.print(f"stopped at step {step} by {REASONS[stop]}; continue with --resume_from_checkpoint latest")
        if REASONS[stop] != "--max_hours":  # when the time is up, what there is by then is the result
            accelerator.end_training()
            raise interrupted(REASONS[stop])
    trained_network = result()
    if best is not None:
        best.restore(trained_network)
    return trained_network


def cut_metrics(file: Path, step: int, validates: bool) -> None:
    """
    Leaves in `metrics.jsonl` what was reported up to a step, from which the run goes on. If it goes on with the
    validation of that step, only what came before that.
    """
    kept = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            at = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # cut off when the disk was full
            continue
        if at < step or (at == step and not (validates and kept and kept[-1][0] == step)):
            kept.append((at, line))
    if file.exists():
        write_text(file, "".join(f"{line}\n" for _, line in kept))


@torch.no_grad()
def validation_losses(args, accelerator: Accelerator, network, data: Data, compute_loss) -> dict[str, float]:
    """
    The loss of the held-out rows, and its parts. A row meets the same noise every time, so that the numbers can be
    compared.
    """
    network.eval()
    sums: dict[str, float] = {}
    count = 0
    mine = data.validation_batches(args.train_batch_size, accelerator.process_index, accelerator.num_processes)
    for batch in mine:
        generators = make_generators(args.seed, "validation", batch["positions"], accelerator.device)
        tensors = {k: v.to(accelerator.device) for k, v in batch.items() if torch.is_tensor(v)}
        with accelerator.autocast():
            loss = Loss.of(compute_loss(network, tensors, generators))
        for name, value in {"loss": loss.total, **loss.parts}.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(generators)
        count += len(generators)
    everyone = gather_object([(sums, count)])  # a process may have no rows, and then it does not know the parts
    total = sum(count for _, count in everyone)
    return {f"validation_{name}": sum(sums.get(name, 0.0) for sums, _ in everyone) / total for name in everyone[0][0]}
