"""Trains a transformer to generate the tokens of an audio codec by score-entropy discrete diffusion.

    python train_sedd.py --config recipes/fsdd-tokens-cpu.yaml --dataset_name tokens/digits --output_dir outputs/digits
    accelerate launch --num_processes 8 train_sedd.py --config recipes/sedd-music.yaml --dataset_name tokens/songs
    python train_sedd.py --dataset_name tokens/digits --test

The dataset is one that audio_to_tokens.py made; its codec and classes come from there. --output_dir receives
`checkpoint-<step>` folders, `metrics.jsonl` (losses are nats per token), what the network generates in `samples`, and
at the end the pipeline, with the averaged weights and the codec.
"""

import argparse
import json
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import Any

from tonefield.command_line import UserError, first_line, make_parser, parse, run
from tonefield.files import write_text, writing
from tonefield.training.arguments import (
    add_data_arguments,
    add_text_arguments,
    add_training_arguments,
    check_arguments,
    prepare_output_dir,
)
from tonefield.training.networks import read_model_config


# A network for small sets of short sounds, without a GPU; the other sizes are those of the transformer.
MICRO = dict(hidden_size=256, num_layers=6, num_heads=4)
MODEL_SIZES = ("micro", "tiny", "small", "medium")

# Which noise schedules have which settings.
SCHEDULES = {
    "loglinear": ("eps",), "cosine": ("eps",), "cosine_squared": ("eps",),
    "geometric": ("sigma_min", "sigma_max"), "linear": ("sigma_min", "sigma_max"),
}  # fmt: skip


def parse_args(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    data = add_data_arguments(parser, max_validation_samples=None)
    data.add_argument(
        "--seq_length",
        type=int,
        metavar="N",
        help="frames of a sequence: longer recordings are cropped, shorter ones padded and masked (default: those of"
        " the longest recording, at most 1024)",
    )
    data.add_argument("--class_column", default="label", metavar="NAME", help="the classes (default: %(default)s)")
    data.add_argument(
        "--class_conditional",
        action=BooleanOptionalAction,
        default=None,
        help="tell the network the class (default: if the dataset has at least two)",
    )
    data.add_argument(
        "--label_dropout",
        type=float,
        default=0.1,
        metavar="P",
        help="how often the class is withheld, for classifier-free guidance (default: %(default)s)",
    )
    add_text_arguments(data)

    model = parser.add_argument_group("network and noise")
    model.add_argument("--model_size", choices=MODEL_SIZES, default="tiny", help="(default: %(default)s)")
    model.add_argument(
        "--model_config", metavar="FILE", help="instead: the SEDDTransformer1DModel's arguments, JSON or YAML"
    )
    model.add_argument("--dropout", type=float, default=0.1, metavar="P", help="(default: %(default)s)")
    model.add_argument(
        "--time_conditioning",
        action=BooleanOptionalAction,
        default=None,
        help="tell the network the noise level (default: with the uniform graph)",
    )
    model.add_argument(
        "--layout",
        choices=["parallel", "flatten", "codebook_major"],
        default="parallel",
        help="several codebooks: all of a frame at once (default), frame by frame, or codebook by codebook",
    )
    model.add_argument(
        "--graph_type", choices=["absorb", "uniform"], default="absorb", help="noise masks tokens, or replaces them"
    )
    model.add_argument("--noise_schedule", choices=SCHEDULES, default="loglinear", help="(default: %(default)s)")
    model.add_argument("--sigma_min", type=float, help="smallest total noise of geometric and linear (default: 1e-4)")
    model.add_argument("--sigma_max", type=float, help="largest one (default: 20)")
    model.add_argument("--eps", type=float, help="what the other schedules leave untouched at the end (default: 1e-3)")
    model.add_argument(
        "--parameterization",
        choices=["normalized", "score"],
        default="normalized",
        help="the network's output as probabilities (default), or as scores without a sum",
    )
    model.add_argument(
        "--t_sampling",
        choices=["stratified", "uniform", "importance", "mask_count"],
        default="stratified",
        help="times of a step: spread evenly (default), independent, with equal weights, or by the number of masks",
    )
    model.add_argument(
        "--sampling_eps", type=float, default=1e-3, metavar="T", help="smallest time (default: %(default)s)"
    )
    model.add_argument(
        "--num_inference_steps",
        type=int,
        default=64,
        metavar="N",
        help="steps of validation samples (default: %(default)s)",
    )
    model.add_argument(
        "--num_validation_draws",
        type=int,
        default=8,
        metavar="N",
        help="noise levels at which every held-out sequence is looked at (default: %(default)s)",
    )
    add_training_arguments(parser)
    parser.set_defaults(learning_rate=3e-4, lr_warmup_steps=2500)
    args = parse(parser, argv)

    check_arguments(parser, args, "audio_to_tokens.py")
    for name in ("label_dropout", "prompt_dropout", "dropout"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} lies between 0 and 1, not at {getattr(args, name):g}")
    for name in ("seq_length", "num_inference_steps", "num_validation_draws"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is at least 1, not {value}")
    for name in ("eps", "sigma_min", "sigma_max"):
        if getattr(args, name) is not None and name not in SCHEDULES[args.noise_schedule]:
            parser.error(f"--{name} has no meaning with --noise_schedule {args.noise_schedule}")
    if args.t_sampling == "mask_count" and args.graph_type == "uniform":
        parser.error("--t_sampling mask_count has no meaning with --graph_type uniform, which has no masks")
    return args


def make_scheduler(args, codec):
    """The noise law of the flags over the symbols of the layout."""
    from tonefield.models.token_layouts import vocabulary_size
    from tonefield.schedulers import ScoreEntropyScheduler

    given = {name: getattr(args, name) for name in ("eps", "sigma_min", "sigma_max")}
    try:
        return ScoreEntropyScheduler(
            vocab_size=vocabulary_size(args.layout, codec.num_codebooks, codec.codebook_size),
            graph_type=args.graph_type,
            noise_schedule=args.noise_schedule,
            parameterization=args.parameterization,
            sampling_eps=args.sampling_eps,
            **{name: value for name, value in given.items() if value is not None},
        )
    except ValueError as error:
        raise UserError(first_line(error).replace("`", "")) from None


def make_transformer(args, data, scheduler, text_dim: int | None = None):
    """The network for the data: the flags' size, with the symbols of the scheduler and the codebooks of the codec."""
    import torch

    from tonefield.models import SEDDTransformer1DModel
    from tonefield.models.transformer_sedd import PRESETS

    told = args.graph_type == "uniform" if args.time_conditioning is None else args.time_conditioning
    derived = {
        "vocab_size": scheduler.config.vocab_size,
        "graph_type": args.graph_type,
        "num_classes": len(data.class_names) or None,
        "text_dim": text_dim,
        "num_codebooks": data.codec.num_codebooks,
        "layout": args.layout,
    }
    if args.model_config:
        size = read_model_config(args.model_config)
        size = {name: value for name, value in size.items() if not name.startswith("_")}
        for name, wanted in derived.items():
            if size.get(name, wanted) != wanted:
                raise UserError(f"--model_config has {name} {size[name]}, the dataset and the flags want {wanted}.")
    else:
        size = (PRESETS | {"micro": MICRO})[args.model_size]
    usual = {"dropout": args.dropout, "time_conditioning": told, "max_length": data.num_frames}
    arguments: dict[str, Any] = usual | size | derived
    torch.manual_seed(args.seed)
    try:
        model = SEDDTransformer1DModel(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"SEDDTransformer1DModel cannot be built: {first_line(error)}") from None
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


class Words:
    """Captions as a batch of words, for worker processes as well; a row without a caption has none."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, captions: list) -> dict:
        import torch

        texts = [str(caption or "") for caption in captions]
        words = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        there = torch.tensor([bool(text) for text in texts])
        return {"word_ids": words["input_ids"], "word_mask": words["attention_mask"].bool() & there[:, None]}


def make_condition(args, data, encoder):
    """`condition(batch, generators, training)`: what the network is told beside the tokens, now and then withheld."""
    import torch

    from tonefield.training.randomness import uniform

    def withheld(count, generators, dropout, device):
        return uniform(count, generators, device) < dropout

    def condition(batch, generators, training: bool) -> dict:
        told = {} if "mask" not in batch else {"attention_mask": batch["mask"]}
        count, device = len(batch["tokens"]), batch["tokens"].device
        if "class_labels" in batch:
            labels, null_class = batch["class_labels"], len(data.class_names)
            none = labels < 0
            if training:
                none = none | withheld(count, generators, args.label_dropout, device)
            told["class_labels"] = torch.where(none, null_class, labels)
        if encoder is not None:
            mask = batch["word_mask"]
            with torch.no_grad():
                # The encoder sees a row of no words as one of all words, which the network then does not see.
                seen = mask | ~mask.any(dim=1, keepdim=True)
                told["encoder_hidden_states"] = encoder(batch["word_ids"], seen).last_hidden_state
            if training:
                mask = mask & ~withheld(count, generators, args.prompt_dropout, device)[:, None]
            told["encoder_attention_mask"] = mask
        return told

    return condition


def make_loss(args, scheduler, data, condition, samples_per_step: int):
    """
    `compute_loss` of the training loop: nats per token of a batch.

    It is the sum over the tokens divided by how many a batch has on average, not by how many this one has: so every
    token weighs the same, and it does not matter how a step is divided into batches and processes.
    """
    from torch.nn.functional import pad

    mean_tokens = data.mean_frames * data.codec.num_codebooks

    def compute_loss(transformer, batch, generators):
        told = condition(batch, generators, transformer.training)
        clean, mask, length = batch["tokens"], batch.get("mask"), batch["tokens"].shape[-1]
        # Noise is drawn for whole sequences, so that it does not depend on the longest recording of the batch.
        missing = (0, max(0, data.num_frames - length))
        strata = batch["places"] % samples_per_step, samples_per_step
        whole = None if mask is None else pad(mask, missing)
        if whole is None and missing[1]:
            whole = pad(clean.new_ones(len(clean), length, dtype=bool), missing)
        noisy, t, weight = scheduler.sample_noisy(pad(clean, missing), generators, whole, args.t_sampling, strata)
        noisy = noisy[..., :length]
        output = transformer(noisy, scheduler.sigma(t), **told).sample
        nats = scheduler.loss(output, noisy, clean, t, mask) * weight.to(output.dtype)
        return nats.sum() / (len(nats) * mean_tokens)

    return compute_loss


def make_validation(args, accelerator, scheduler, data, condition):
    """`validate` of the training loop: the bound of the negative log-likelihood of all held-out tokens, per token."""
    import math

    import torch
    from torch.nn.functional import pad

    from tonefield.training.randomness import make_generators

    @torch.no_grad()
    def validate(transformer) -> dict[str, float]:
        transformer.eval()
        device = accelerator.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        mine = data.validation_batches(args.train_batch_size, accelerator.process_index, accelerator.num_processes)
        for batch in mine:
            # A sequence meets the same noise every time, so that the numbers can be compared.
            generators = make_generators(args.seed, "validation", batch["positions"], device)
            batch = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}
            told = condition(batch, generators, training=False)
            tokens, mask = batch["tokens"], batch.get("mask")
            length = tokens.shape[-1]
            # Noise is drawn for whole sequences, as in training: it does not depend on what is in the batch besides.
            missing = (0, max(0, data.num_frames - length))
            whole = None if mask is None else pad(mask, missing)
            if whole is None and missing[1]:
                whole = pad(tokens.new_ones(len(tokens), length, dtype=torch.bool), missing)

            def network(noisy, sigma, told=told, length=length, missing=missing):
                with accelerator.autocast():
                    return pad(transformer(noisy[..., :length], sigma, **told).sample, (0, 0, *missing))

            nats = scheduler.nll_bound(network, pad(tokens, missing), args.num_validation_draws, generators, whole)
            count = tokens.numel() if mask is None else mask.sum() * (tokens[0].numel() // mask.shape[1])
            total += torch.stack([nats.sum().double(), torch.as_tensor(count, device=device).double()])
        nats, tokens = accelerator.reduce(total, "sum").tolist()
        return {"validation_loss": nats / tokens, "validation_bits_per_token": nats / tokens / math.log(2)}

    return validate


def sample_titles(args, data) -> list[str]:
    """What the sounds of a validation are told: classes, or held-out texts."""
    from tonefield.training.validation import spread_labels

    labels = spread_labels(args.num_validation_samples, len(data.class_names))
    if labels is not None:
        return [data.class_names[label] for label in labels.tolist()]
    return data.captions(args.num_validation_samples) or []


def make_pipeline(args, accelerator, transformer, scheduler, data, text):
    """What is saved and pushed: the trained network with all that belongs to it, and the facts of its model card."""
    from tonefield.pipelines import SEDDTokenPipeline
    from tonefield.training.publishing import training_facts

    defaults = parse_args(["--dataset_name=none"])
    card = training_facts("train_sedd.py", args, defaults, accelerator, sample_titles(args, data))
    label2id = {name: label for label, name in enumerate(data.class_names)} or None
    return SEDDTokenPipeline(transformer, scheduler, data.codec, *text, card=card, label2id=label2id)


def make_samples(args, accelerator, scheduler, data, text):
    """`generate` of the training loop: sounds of a usual length, with classes and held-out texts if there are any."""
    from tonefield.pipelines import SEDDTokenPipeline
    from tonefield.training.randomness import make_generators
    from tonefield.training.validation import show_sounds, spread_labels

    count, folder = args.num_validation_samples, Path(args.output_dir, "samples")
    labels, prompts = spread_labels(count, len(data.class_names)), data.captions(count)
    titles = sample_titles(args, data)

    def generate(transformer, step: int) -> None:
        if not count:
            return
        law = type(scheduler).from_config(scheduler.config)  # the run of another leaves no trace in this one
        pipeline = SEDDTokenPipeline(transformer, law, data.codec.to(accelerator.device), *text)
        pipeline.set_progress_bar_config(disable=True)
        generators = make_generators(args.seed, "sample", list(range(count)), accelerator.device)
        sounds: Any = pipeline(
            batch_size=count, class_labels=labels, prompt=prompts, num_frames=max(1, round(data.mean_frames)),
            num_inference_steps=args.num_inference_steps, generator=generators, output_type="pt",
        )  # fmt: skip
        show_sounds(sounds.audios.float().cpu(), sounds.sampling_rate, titles, folder, step, accelerator.trackers)

    return generate


def held_out_sounds(data):
    """What generated sounds are compared with: the held-out codes through the same codec."""
    import torch

    sounds = []
    with torch.no_grad():
        for codes in data.validation["codes"]:
            codes = torch.as_tensor(codes, dtype=torch.long, device=data.codec.device)[None]
            sounds.append(data.codec.decode(codes)[0].float().cpu().clamp(-1, 1).numpy())
    return sounds, data.codec.sampling_rate


def main(args: argparse.Namespace) -> None:
    folder = prepare_output_dir(args.output_dir)

    from tonefield.training.checkpoints import CONTINUE
    from tonefield.training.loop import make_accelerator, train
    from tonefield.training.publishing import find_repository, publish, settings_of
    from tonefield.training.text import open_text_encoder
    from tonefield.training.token_data import open_tokens
    from tonefield.training.validation import with_metrics

    accelerator = make_accelerator(args)
    tokenizer, encoder = open_text_encoder(args)
    data = open_tokens(args, args.layout, tokenizer and Words(tokenizer))
    scheduler = make_scheduler(args, data.codec)
    transformer = make_transformer(args, data, scheduler, encoder and encoder.config.d_model)
    repository = find_repository(args) if args.push_to_hub and accelerator.is_main_process else None
    if encoder is not None:
        encoder.to(accelerator.device)

    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    classes = f"{len(data.class_names)} classes" if data.class_names else "no classes"
    books = f"{data.codec.num_codebooks} x " if data.codec.num_codebooks > 1 else ""
    accelerator.print(
        f"{parameters:,} parameters, {data.num_frames} frames ({data.mean_frames:.4g} on average) of"
        f" {books}{data.codec.codebook_size} codes, {classes}"
    )
    fixed = {"scheduler": settings_of(scheduler), "network": settings_of(transformer), "t sampling": args.t_sampling}
    condition = make_condition(args, data, encoder)
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    trained = train(
        args,
        accelerator,
        transformer,
        data,
        make_loss(args, scheduler, data, condition, samples_per_step),
        with_metrics(
            args,
            accelerator,
            make_samples(args, accelerator, scheduler, data, (tokenizer, encoder)),
            lambda: held_out_sounds(data),
        ),
        fixed,
        "transformer",
        make_validation(args, accelerator, scheduler, data, condition),
    )
    if accelerator.is_main_process:
        pipeline = make_pipeline(args, accelerator, trained, scheduler, data, (tokenizer, encoder))
        with writing(folder, CONTINUE):
            pipeline.save_pretrained(folder)
        about = {"flags": vars(args), "class_names": data.class_names} | fixed
        write_text(folder / "training.json", json.dumps(about, indent=1, default=str))
        print(f"the pipeline is in {folder}")
        if repository is not None:
            publish(pipeline, folder, repository)
    accelerator.end_training()


if __name__ == "__main__":
    run(main, parse_args())
