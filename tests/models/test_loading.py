"""One call for all audio tokenizers: by name, from folders of ours and of transformers."""

import json

import pytest
import torch
from transformers import DacConfig, DacModel

from tonefield.models import FSQCodec, MelSpectrogram, MuLawTokenizer, TransformersCodec, load_audio_tokenizer


def test_by_name_and_from_folders(tmp_path):
    torch.manual_seed(0)
    config = DacConfig(
        encoder_hidden_size=4, decoder_hidden_size=8, downsampling_ratios=[4], upsampling_ratios=[4], n_codebooks=2,
        codebook_size=16, codebook_dim=2, hop_length=4,
    )  # fmt: skip
    DacModel(config).save_pretrained(tmp_path / "dac")
    tokenizers = {
        "mulaw": MuLawTokenizer(4000, 2),
        "fsq": FSQCodec(8000, 80, 160, (3, 3), 1, 8, 1, 1),
        "wrapped": TransformersCodec.from_transformers(str(tmp_path / "dac"), num_codebooks=1),
    }
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / name)
        loaded = load_audio_tokenizer(tmp_path / name)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint() == tokenizer.fingerprint()
    inside = load_audio_tokenizer(tmp_path, subfolder="fsq")  # as a pipeline or a dataset holds it
    assert inside.fingerprint() == tokenizers["fsq"].fingerprint()
    direct = load_audio_tokenizer(tmp_path / "dac", num_codebooks=2)
    assert (type(direct), direct.num_codebooks) == (TransformersCodec, 2)
    plain = load_audio_tokenizer("mulaw", sampling_rate=16000)
    assert (plain.sampling_rate, plain.hop_length) == (16000, 1)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    MelSpectrogram.from_preset("fsdd-64").save_pretrained(tmp_path / "mel")
    with pytest.raises(ValueError, match="mel holds a MelSpectrogram, which is no audio tokenizer: those are MuLaw"):
        load_audio_tokenizer(tmp_path / "mel")
    with pytest.raises(OSError, match="nowhere is neither 'mulaw', nor a folder or Hub id of an audio tokenizer"):
        load_audio_tokenizer(tmp_path / "nowhere")
    (tmp_path / "clap").mkdir()
    (tmp_path / "clap" / "config.json").write_text(json.dumps({"model_type": "clap"}))
    with pytest.raises(ValueError, match="'clap' is no codec that is known here: those are encodec, dac, mimi"):
        load_audio_tokenizer(tmp_path / "clap")
