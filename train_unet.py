"""Trains a U-Net to generate mel spectrograms, their latents, or pictures by Poisson flow, diffusion or a score SDE.

    python train_unet.py --config recipes/fsdd-64-cpu.yaml --dataset_name mels/digits --output_dir outputs/digits
    accelerate launch --num_processes 8 train_unet.py --config recipes/fsdd-64-gpu.yaml --dataset_name mels/digits
    python train_unet.py --dataset_name latents/songs --text_encoder google-t5/t5-small
    python train_unet.py --dataset_name mels/songs --vae outputs/songs-vae --text_encoder google/flan-t5-base
    python train_unet.py --dataset_name mels/mine --from_pretrained someone/music-from-words --lora_rank 8
    python train_unet.py --dataset_name mels/digits --test

The dataset is one that audio_to_images.py made; its front end, statistics and classes come from there. With
--image_column any dataset of pictures will do. With --vae the network learns the latents that an autoencoder makes of
the mels; a dataset of latents (train_vae.py --cache_latents) has them ready. With --text_encoder it is told captions.
With --from_pretrained the training goes on from a pipeline; with --lora_rank beside it, what is trained and written is
an adapter for that pipeline: `pipe.load_lora_weights(output_dir)`.
--output_dir receives `checkpoint-<step>` folders, `metrics.jsonl`, what the network generates in `samples`, and at the
end the pipeline, with the averaged weights.
"""

import argparse
import json
import math
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
from tonefield.training.networks import MODEL_SIZES, NETWORKS, POISSON, make_unet


WITH_CHARGES = ("stable_target", "field")
OBJECTIVES = (*POISSON, "epsilon", "v_prediction", "ve", "vp", "subvp")

# Flags that describe what is made anew, and so have no meaning where the training goes on from a pipeline.
KNOWN_TO_A_PIPELINE = (
    "vae", "text_encoder", "class_conditional", "model_size", "model_config", "dropout", "objective", "aug_dim",
    "field_batch_size", "sigma_min", "sigma_max", "p_mean", "p_std",
)  # fmt: skip


def augmented_dimensions(text: str) -> float:
    try:
        value = math.inf if text.lower() == "none" else float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is neither a number above 0 nor inf")
    return value


def parse_args(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    data = add_data_arguments(parser)
    data.add_argument("--image_column", metavar="NAME", help="train on the pictures of this column instead of mels")
    data.add_argument("--random_flip", action=BooleanOptionalAction, default=False, help="mirror half of the pictures")
    data.add_argument(
        "--dequantize",
        action=BooleanOptionalAction,
        default=False,
        help="add noise to pictures that fills the gaps between 256 values",
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
    data.add_argument(
        "--vae",
        metavar="NAME",
        help="learn the latents that this autoencoder makes of mels, as they are read: what train_vae.py wrote, or an"
        " AutoencoderKL, folder or Hub id (a dataset of latents brings its own)",
    )
    add_text_arguments(data)

    model = parser.add_argument_group("network and objective")
    model.add_argument("--model_size", choices=MODEL_SIZES, default="small", help="(default: %(default)s)")
    model.add_argument(
        "--model_config",
        metavar="FILE",
        help="instead: the network's arguments, JSON or YAML; _class_name is one of"
        f" {', '.join(NETWORKS)} (default: the first; told a text, the second). A recipe can hold them itself",
    )
    model.add_argument("--dropout", type=float, metavar="P", help="(default: that of --model_config, otherwise 0)")
    model.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="pfgmpp",
        help="PFGM++ for any D (default), with stable targets, PFGM's field; DDPM; score SDEs",
    )
    model.add_argument(
        "--aug_dim",
        type=augmented_dimensions,
        metavar="D",
        help="augmented dimensions (default: 128, and 1 for field); inf is EDM diffusion",
    )
    model.add_argument(
        "--field_batch_size",
        type=int,
        metavar="K",
        help="charges of stable_target and field, shared equally by the processes (default: their batches alone)",
    )
    model.add_argument("--sigma_min", type=float, help="smallest noise level (default: the scheduler's)")
    model.add_argument("--sigma_max", type=float, help="largest one (default: the scheduler's; field: from the data)")
    model.add_argument("--p_mean", type=float, help="mean of ln(sigma) in training (default: -1.2; field: mid-range)")
    model.add_argument("--p_std", type=float, help="its deviation (default: 1.2; field: as wide as the range)")
    model.add_argument(
        "--num_inference_steps",
        type=int,
        metavar="N",
        help="steps of validation samples (default: 18; DDPM 50; score SDEs 200)",
    )
    model.add_argument(
        "--from_pretrained",
        metavar="NAME",
        help="go on from the network of this pipeline, folder or Hub id, which knows its objective and its encoders",
    )
    model.add_argument(
        "--lora_rank",
        type=int,
        metavar="R",
        help="with --from_pretrained: train an adapter of rank R (LoRA) beside the network, which stays as it is",
    )
    add_training_arguments(parser)
    args = parse(parser, argv)

    check_arguments(parser, args)
    if args.test:
        args.num_inference_steps = min(args.num_inference_steps or 4, 4)
    if args.from_pretrained is not None:
        for name in KNOWN_TO_A_PIPELINE:
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} is what --from_pretrained knows: leave it out (of the recipe, too)")
    if args.lora_rank is not None and args.from_pretrained is None:
        parser.error("--lora_rank adapts a network: name the pipeline that holds it with --from_pretrained")
    if args.lora_rank is not None and args.lora_rank < 1:
        parser.error(f"--lora_rank is at least 1, not {args.lora_rank}")
    for name in ("label_dropout", "prompt_dropout", "dropout"):
        if not 0 <= (getattr(args, name) or 0) < 1:
            parser.error(f"--{name} lies between 0 and 1, not at {getattr(args, name):g}")
    if args.objective not in POISSON and args.aug_dim is not None:
        parser.error(f"--aug_dim has no meaning with --objective {args.objective}")
    if args.objective not in WITH_CHARGES and args.field_batch_size is not None:
        parser.error(f"--field_batch_size has no meaning with --objective {args.objective}")
    if args.objective == "field" and args.aug_dim == math.inf:
        parser.error("--objective field needs a finite --aug_dim")
    if args.mixed_precision == "fp16" and args.objective in POISSON and noise_dimensions(args) < 2:
        # |noise| exceeds 10^4 once in 10^4 samples at D = 1, once in 10^8 at D = 2; a float16 ends at 65504.
        parser.error("--mixed_precision fp16 cannot hold the noise of less than 2 augmented dimensions: use bf16")
    if args.objective in WITH_CHARGES and args.field_batch_size is not None and args.streaming:
        parser.error("--field_batch_size wants rows by number, which --streaming does not have")
    for name in ("vae", "text_encoder"):
        if getattr(args, name) is None:
            continue
        if args.image_column is not None:
            parser.error(f"--{name} belongs to mels, and --image_column to pictures")
        if args.class_conditional:
            parser.error(f"--class_conditional does not go with --{name}: what makes the sound is told no classes")
        args.class_conditional = False
    if args.text_encoder is not None and args.objective in WITH_CHARGES:
        parser.error(f"--objective {args.objective} knows classes, not texts: use pfgmpp with --text_encoder")
    if args.vae is not None and args.field_batch_size is not None:
        parser.error("--field_batch_size wants latents without --vae: train_vae.py --cache_latents makes them")
    return args


def noise_dimensions(args) -> float:
    """D, which may be infinite."""
    return args.aug_dim or (1 if args.objective == "field" else 128)


def make_scheduler(args, data):
    """The scheduler of the objective; what depends on the data is computed from the data."""
    from diffusers import DDPMScheduler

    from tonefield.schedulers import PoissonFlowScheduler, ScoreSDEScheduler, pfgm_hyperparameters

    sigmas = {name: getattr(args, name) for name in ("sigma_min", "sigma_max") if getattr(args, name) is not None}
    law = {name: getattr(args, name) for name in ("p_mean", "p_std") if getattr(args, name) is not None}
    try:
        if args.objective in ("epsilon", "v_prediction"):
            return DDPMScheduler(prediction_type=args.objective, clip_sample=False)
        if args.objective not in POISSON:
            return ScoreSDEScheduler(args.objective, **sigmas)
        aug_dim = noise_dimensions(args)
        settings = {"aug_dim": None if aug_dim == math.inf else aug_dim, "sigma_data": data.sigma_data}
        if args.objective == "field":
            size = math.prod(data.sample_shape)
            _, z_max, _ = pfgm_hyperparameters(data.sigma_data * math.sqrt(size), size)
            low, high = 0.002, z_max / math.sqrt(aug_dim)
            low, high = sigmas.get("sigma_min", low), sigmas.get("sigma_max", high)
            # PFGM's noise levels are uniform in ln(sigma): the normal law of the same mean and deviation. Close to the
            # data (z_exp) the component along the augmented axis, one of N + 1 in the loss, is not to be trusted.
            settings |= {
                "prediction_type": "field",
                "z_exp": 1.0,
                "sigma_min": low,
                "sigma_max": high,
                "p_mean": math.log(low * high) / 2,
                "p_std": math.log(high / low) / math.sqrt(12),
            }
        return PoissonFlowScheduler(**settings | sigmas | law)
    except ValueError as error:
        raise UserError(first_line(error).replace("`", "")) from None


def make_loss(args, scheduler, data, accelerator, vae=None, texts=None, encoder=None):
    """
    `compute_loss` of the training loop for the objective: told the class or the text, and with charges where it has
    any. With a `vae` the mels of the batch are made latents first; the `encoder` encodes the texts of a stream.
    """
    import torch

    from tonefield.training import objectives
    from tonefield.training.randomness import uniform

    null = None
    if texts is not None:
        from tonefield.pipelines.tonefield_text import encode_tokens
        from tonefield.training.text import withhold

        null = texts([""])["text_states"][0].to(accelerator.device)
    if vae is not None:
        from tonefield.training.latents import draw_latents

    null_class = len(data.class_names)
    of_validation = []

    def told(labels, generators, dropout):
        """Labels as the network is told them: the last class is no class."""
        withheld = (labels < 0) | (uniform(len(labels), generators, labels.device) < dropout)
        return torch.where(withheld, null_class, labels)

    def charges_of(batch, training):
        """All processes' samples and the further rows that `--field_batch_size` asks for, with their classes."""
        if not training:
            if not of_validation:
                of_validation.append(held_out_charges(batch["clean"].device))
            return of_validation[0]
        charges, classes = batch["clean"], batch.get("class_labels")
        if "charges" in batch:
            charges = torch.cat([charges, batch["charges"]])
            classes = None if classes is None else torch.cat([classes, batch["charge_labels"]])
        return accelerator.gather(charges), None if classes is None else accelerator.gather(classes)

    def held_out_charges(device):
        """All that is held out, and some of the further rows: whatever the batches and processes of validation."""
        batches = [to(batch, device) for batch in data.validation_batches(args.train_batch_size)]
        if vae is not None:
            batches = [encode(batch) for batch in batches]
        if args.field_batch_size is not None:
            batches.append(to(data.train.get(list(range(args.field_batch_size)), "charges"), device))
        names = ("clean", "class_labels") if "class_labels" in batches[0] else ("clean",)
        charges, *classes = (torch.cat([batch[name] for batch in batches]) for name in names)
        return charges, classes[0] if classes else None

    def to(batch, device):
        return {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}

    def encode(batch):
        assert vae is not None
        with accelerator.autocast():
            return batch | {"clean": draw_latents(vae, batch["clean"], batch["posterior_noise"])}

    def read_text(batch, generators, dropout):
        """What the network is told of the texts; of those that are withheld, the empty text."""
        mask = batch["text_mask"]
        states = batch["text_states"] if "text_states" in batch else encode_tokens(encoder, batch["text_ids"], mask)
        if null is not None and dropout:
            withheld = uniform(len(states), generators, states.device) < dropout
            states, mask = withhold(states, mask, withheld, null)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def compute_loss(unet, batch, generators):
        if vae is not None:
            batch = encode(batch)
        clean, labels, arguments = batch["clean"], None, {}
        if "class_labels" in batch:
            labels = told(batch["class_labels"], generators, args.label_dropout if unet.training else 0.0)
            arguments["class_labels"] = labels
        if texts is not None:
            arguments |= read_text(batch, generators, args.prompt_dropout if unet.training else 0.0)

        def network(x, timestep):
            return unet(x, timestep, **arguments).sample

        if args.objective in WITH_CHARGES:
            charges, classes = charges_of(batch, unet.training)
            classes = None if classes is None or labels is None else (labels, classes)
            loss = objectives.field_loss if args.objective == "field" else objectives.stable_target_loss
            return loss(network, clean, generators, scheduler, charges, classes)
        loss = objectives.denoiser_loss
        if args.objective not in POISSON:
            ddpm = args.objective in ("epsilon", "v_prediction")
            loss = objectives.ddpm_loss if ddpm else objectives.score_sde_loss
        return loss(network, clean, generators, scheduler)

    return compute_loss


def sample_titles(args, data, texts) -> list[str]:
    """What the sounds of a validation were told, if there was one."""
    from tonefield.training.text import some_captions
    from tonefield.training.validation import spread_labels

    if not Path(args.output_dir, "samples").is_dir():
        return []
    if texts is not None:
        return some_captions(data, args.caption_column, args.num_validation_samples)
    labels = spread_labels(args.num_validation_samples, len(data.class_names))
    return [] if labels is None else [data.class_names[label] for label in labels.tolist()]


def make_pipeline(args, accelerator, unet, scheduler, data, steps: int, vae, text, pretrained, titles):
    """What is saved and pushed: the trained network with all that belongs to it, and the facts of its model card."""
    from tonefield.pipelines import LatentAudioDiffusionPipeline, MelPFGMPipeline
    from tonefield.training.publishing import training_facts

    defaults = parse_args(["--dataset_name=none"])
    card = training_facts("train_unet.py", args, defaults, accelerator, titles)
    card |= {"objective": args.objective, "num_inference_steps": steps}
    label2id = {name: label for label, name in enumerate(data.class_names)} or None
    if pretrained is not None:
        components = pretrained.components | {"unet": unet}
        named = {"label2id": label2id} if label2id else {}
        return type(pretrained)(**components, card=card, **named)
    if vae is not None or text[1] is not None:
        return LatentAudioDiffusionPipeline(unet, scheduler, data.mel, vae, *text, card=card)
    return MelPFGMPipeline(unet, scheduler, data.mel, card=card, label2id=label2id)


def make_samples(args, accelerator, scheduler, data, steps: int, vae, texts):
    """`generate` of the training loop: mels or pictures, of all classes or held-out captions if there are any."""
    from tonefield.training.validation import draw_samples, show_mels, show_samples, spread_labels

    count, folder = args.num_validation_samples, Path(args.output_dir, "samples")
    labels, trackers = spread_labels(count, len(data.class_names)), accelerator.trackers

    def generate(network, step: int) -> None:
        samples = draw_samples(network, scheduler, data.sample_shape, count, steps, args.seed, labels)
        show_samples(samples, data, labels, folder, step, trackers)

    def generate_as_the_pipeline_does(network, step: int) -> None:
        from tonefield.pipelines import LatentAudioDiffusionPipeline
        from tonefield.training.randomness import make_generators
        from tonefield.training.text import some_captions

        place = None if vae is None else vae.device
        law = type(scheduler).from_config(scheduler.config)  # the run of another leaves no trace in this one
        pipeline = LatentAudioDiffusionPipeline(network, law, data.mel, vae).to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        captions, words = [], {}
        if texts is not None:
            captions = some_captions(data, args.caption_column, count)
            for name, some in (("", captions), ("negative_", [""])):
                read = texts(some)
                words |= {f"{name}prompt_embeds": read["text_states"]}
                words |= {f"{name}prompt_attention_mask": read["text_mask"]}
        mels: Any = pipeline(
            num_waveforms_per_prompt=1 if words else count, num_inference_steps=steps, output_type="mel",
            generator=make_generators(args.seed, "sample", list(range(count)), accelerator.device), **words,
        ).mels  # fmt: skip
        pipeline.mel.to("cpu")
        if vae is not None:  # which nothing else needs on the device where the latents are ready
            vae.to(place)
        show_mels(mels, data.mel, folder, step, trackers, captions)

    if not count:
        return None
    return generate if vae is None and texts is None else generate_as_the_pipeline_does


def held_out_sounds(args, accelerator, data, vae):
    """What generated sounds are compared with: the held-out mels or latents, made audible in the same way."""
    from tonefield.training.latents import draw_latents
    from tonefield.training.validation import held_out_mels

    if not data.vae:
        return held_out_mels(data, args.train_batch_size)
    place = vae.device
    vae.to(accelerator.device)

    def decode(batch):
        latents = batch["clean"].to(vae.device)
        if "posterior_noise" in batch:  # of a dataset of mels
            latents = draw_latents(vae, latents, batch["posterior_noise"].to(vae.device))
        scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        return vae.decode(scaled).sample

    sounds = held_out_mels(data, args.train_batch_size, decode)
    vae.to(place)
    return sounds


def main(args: argparse.Namespace) -> None:
    folder = prepare_output_dir(args.output_dir)

    from tonefield.training.checkpoints import CONTINUE
    from tonefield.training.data import open_data
    from tonefield.training.latents import encode_on_the_fly, open_vae_of_latents
    from tonefield.training.loop import make_accelerator, train
    from tonefield.training.lora import add_lora, base_fingerprint, write_lora
    from tonefield.training.pretrained import check_shape, fit_data, open_pretrained
    from tonefield.training.publishing import find_repository, publish, publish_folder, settings_of
    from tonefield.training.text import add_texts, open_text_encoder, text_fingerprint
    from tonefield.training.validation import with_metrics

    accelerator = make_accelerator(args)
    pretrained = open_pretrained(args) if args.from_pretrained is not None else None
    known = {} if pretrained is None else pretrained.components
    if pretrained is None:
        tokenizer, encoder = open_text_encoder(args)
    else:
        tokenizer, encoder = known.get("tokenizer"), known.get("text_encoder")
    data = open_data(args, args.caption_column if encoder is not None else None)
    if pretrained is not None:
        fit_data(args, data, pretrained)
    if args.validation_metrics and data.mel is None:
        raise UserError(f"--validation_metrics compare sounds, and {args.dataset_name} holds pictures.")
    vae = coder = texts = None
    if data.vae:
        if data.class_names:
            raise UserError(f"--class_conditional: {args.dataset_name} holds latents, which know texts, not classes.")
        vae = open_vae_of_latents(args, data, known.get("vae"))
    elif args.vae is not None or known.get("vae") is not None:
        vae = coder = encode_on_the_fly(args, data, known.get("vae"), known.get("mel")).to(accelerator.device)
    if pretrained is None:
        unet = make_unet(args, data, encoder.config.d_model if encoder is not None else None)
        scheduler = make_scheduler(args, data)
    else:
        unet, scheduler = pretrained.unet, pretrained.scheduler
        check_shape(args, data, unet)
        if args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
    fixed = {"objective": args.objective, "scheduler": settings_of(scheduler), "network": settings_of(unet)}
    if args.lora_rank is not None:
        fixed |= {"LoRA rank": args.lora_rank, "network beneath the LoRA": base_fingerprint(unet)}
        add_lora(args, unet)
    if args.objective in WITH_CHARGES:
        fixed["charges"] = prepare_charges(args, data, accelerator.num_processes)
    repository = find_repository(args) if args.push_to_hub and accelerator.is_main_process else None
    if encoder is not None:
        with accelerator.local_main_process_first():  # the others find in the cache what this one has encoded
            texts = add_texts(args, data, tokenizer, encoder, accelerator.device, accelerator.is_main_process)
        fixed["text encoder"] = text_fingerprint(tokenizer, encoder)
    steps = args.num_inference_steps
    steps = steps or (18 if args.objective in POISSON else 50 if "prediction" in args.objective else 200)
    try:
        type(scheduler).from_config(scheduler.config).set_timesteps(steps)
    except ValueError as error:
        raise UserError(f"--num_inference_steps {steps}: {first_line(error)}") from None

    parameters, trained = (
        sum(value.numel() for value in unet.parameters() if value.requires_grad or every) for every in (True, False)
    )
    share = "" if trained == parameters else f" ({trained:,} of them trained)"
    told = f"{len(data.class_names)} classes" if data.class_names else "no classes"
    if texts is not None:
        told = "captions as they come" if args.streaming else f"{len(texts.places) - 1} different captions"
    kind = "latents" if data.vae else "samples"
    accelerator.print(f"{parameters:,} parameters{share}, {'x'.join(map(str, data.sample_shape))} {kind}, {told}")
    loss = make_loss(args, scheduler, data, accelerator, coder, texts, encoder)
    generate = make_samples(args, accelerator, scheduler, data, steps, vae, texts)
    generate = with_metrics(args, accelerator, generate, lambda: held_out_sounds(args, accelerator, data, vae))
    result = train(args, accelerator, unet, data, loss, generate, fixed)
    if accelerator.is_main_process:
        about = {"flags": vars(args), "class_names": data.class_names} | fixed
        write_text(folder / "training.json", json.dumps(about, indent=1, default=str))
        text = (tokenizer, encoder)
        titles = sample_titles(args, data, texts)
        pipeline = make_pipeline(args, accelerator, result, scheduler, data, steps, vae, text, pretrained, titles)
        if args.lora_rank is not None:
            with writing(folder, CONTINUE):
                write_lora(args, result, pipeline.config.card, folder, repository)
            print(f"the LoRA is in {folder}: pipe.load_lora_weights({str(folder)!r})")
            if repository is not None:
                publish_folder(folder, repository)
        else:
            with writing(folder, CONTINUE):
                pipeline.save_pretrained(folder)
            print(f"the pipeline is in {folder}")
            if repository is not None:
                publish(pipeline, folder, repository)
    accelerator.end_training()


def prepare_charges(args, data, num_processes: int) -> int:
    """Has each process read its share of the charges beside its batch; returns how many there are in all."""
    least = args.train_batch_size * num_processes
    wanted = least if args.field_batch_size is None else args.field_batch_size
    if wanted < max(2, least):
        raise UserError(
            f"--objective {args.objective} with a field of {wanted} charges: --field_batch_size must be at least"
            f" {max(2, least)}, the samples of all processes and no less than two."
        )
    share = -(-wanted // num_processes)
    data.train.extra = share - args.train_batch_size
    return share * num_processes


if __name__ == "__main__":
    run(main, parse_args())
