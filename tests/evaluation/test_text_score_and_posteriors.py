"""CLAP score and KL of posteriors: the files, the pairs, and the numbers by hand."""

import json

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from tonefield.command_line import UserError
from tonefield.evaluation import AudioSet, evaluate
from tonefield.evaluation.posteriors import divergence, load_posterior_model, log_posteriors
from tonefield.evaluation.sets import EmbeddedSet


WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "bell", "dog", "rings", "barks"]


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clap")
    torch.manual_seed(0)
    audio = dict(patch_embeds_hidden_size=8, hidden_size=8, depths=[1], num_attention_heads=[2], projection_dim=6)
    text = dict(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, projection_dim=6, type_vocab_size=1,
    )  # fmt: skip
    model = ClapModel(ClapConfig(audio_config=audio, text_config=text, projection_dim=6)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder, model


@pytest.fixture
def captioned(tmp_path):
    rng, captions = np.random.default_rng(0), ["a bell rings", "a dog barks", "a bell rings"]
    for index, seconds in enumerate((1, 2, 11)):
        soundfile.write(tmp_path / f"{index}.wav", rng.uniform(-0.3, 0.3, 48000 * seconds), 48000, subtype="FLOAT")
    rows = [{"file_name": f"{index}.wav", "caption": caption} for index, caption in enumerate(captions)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path, captions


def test_clap_score_by_hand(clap, captioned):
    (weights, model), (folder, captions) = clap, captioned
    report = evaluate([], folder, ["clap_score"], clap=str(weights))
    (result,) = report["results"]
    extractor = ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50)
    cosines = []
    for index, caption in enumerate(captions):
        sound, _ = soundfile.read(folder / f"{index}.wav", dtype="float32")
        windows = [sound[start : start + 480000] for start in range(0, len(sound), 480000)]
        features = [extractor(w, sampling_rate=48000, return_tensors="pt")["input_features"] for w in windows]
        tokens = torch.tensor([[WORDS.index(word) for word in caption.split()]])
        with torch.inference_mode():
            of_sound = model.get_audio_features(torch.cat(features)).pooler_output.sum(0)
            of_text = model.get_text_features(tokens, torch.ones_like(tokens)).pooler_output[0]
        cosines.append(torch.cosine_similarity(of_sound, of_text, dim=0).item())
    assert result["value"] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert result["std"] == pytest.approx(np.std(cosines), abs=1e-4) and np.std(cosines) > 1e-3
    half = 1.96 * np.std(cosines, ddof=1) / np.sqrt(3)
    assert result["interval"] == pytest.approx((np.mean(cosines) - half, np.mean(cosines) + half), abs=2e-4)
    assert result["reference"] is None and result["clips"] == [3] and str(weights) in result["model"]
    assert result["better"] == "higher"
    (folder / "manifest.jsonl").write_text((folder / "manifest.jsonl").read_text().replace("caption", "text"))
    with pytest.raises(UserError, match=r"0\.wav has none: put a metadata.csv or manifest.jsonl"):
        evaluate([], folder, ["clap_score"], clap=str(weights))
    again = evaluate([], folder, ["clap_score"], clap=str(weights), caption_column="text")
    assert again["results"][0]["value"] == pytest.approx(result["value"])


def test_texts_are_not_embedded_without_their_vocabulary(clap, captioned, tmp_path):
    import shutil

    copy = tmp_path / "broken"
    shutil.copytree(clap[0], copy)
    for file in copy.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"The tokenizer of .* (cannot be had|knows no words)"):
        evaluate([], captioned[0], ["clap_score"], clap=str(copy))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=[8, 8],
        conv_kernel=[10, 8], conv_stride=[10, 8], num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_labels=4, classifier_proj_size=8,
    )  # fmt: skip
    model = Wav2Vec2ForSequenceClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.normal_(std=30)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder, model


def test_kl_of_pairs_by_hand(classifier, tmp_path):
    weights, model = classifier
    rng, posteriors = np.random.default_rng(1), {"real": [], "made": []}
    for name in posteriors:
        (tmp_path / name).mkdir()
        for index in range(3):
            sound = np.sin(np.arange(8000 + 1000 * index) * rng.uniform(0.01, 1)).astype(np.float32) * 0.5
            soundfile.write(tmp_path / name / f"{index}.wav", sound, 16000, subtype="FLOAT")
            normal = torch.from_numpy((sound - sound.mean()) / np.sqrt(sound.var() + 1e-7))
            with torch.inference_mode():
                posteriors[name].append(model(normal[None]).logits[0].double().softmax(0).numpy())
    p, q = np.array(posteriors["real"]), np.array(posteriors["made"])
    soundfile.write(tmp_path / "made" / "9.wav", sound, 16000)
    report = evaluate(tmp_path / "real", tmp_path / "made", ["kl"], classifier=str(weights))
    forth, back = report["results"]
    assert (forth["metric"], back["metric"]) == ("kl_ref_gen", "kl_gen_ref")
    assert forth["value"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-3)
    assert back["value"] == pytest.approx((q * np.log(q / p)).sum(1).mean(), rel=1e-3)
    assert forth["value"] != pytest.approx(back["value"], rel=1e-2) and forth["value"] > 1e-4
    assert forth["warnings"] == ["1 files have no counterpart of the same name and are left out"]
    (result, _) = evaluate(tmp_path / "real", tmp_path / "real", ["kl"], classifier=str(weights))["results"]
    assert result["value"] == pytest.approx(0, abs=1e-12) and result["clips"] == [3]
    other = AudioSet.of([sound], 16000)
    with pytest.raises(UserError, match="have none in common"):
        evaluate(tmp_path / "real", other, ["kl"], classifier=str(weights))
    with pytest.raises(UserError, match="nothing/here has no settings"):
        evaluate(tmp_path / "real", tmp_path / "made", ["kl"], classifier="nothing/here")


def test_a_classifier_with_pictures_of_sound(tmp_path):
    torch.manual_seed(0)
    config = ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
    model = ASTForAudioClassification(config).eval()
    model.save_pretrained(tmp_path)
    extractor = ASTFeatureExtractor()
    extractor.save_pretrained(tmp_path)
    sounds = [np.random.default_rng(i).uniform(-1, 1, 16000).astype(np.float32) for i in range(2)]
    rows = load_posterior_model(str(tmp_path), "cpu").embed(sounds)
    for sound, row in zip(sounds, rows, strict=True):
        with torch.inference_mode():
            truth = model(**extractor(sound, sampling_rate=16000, return_tensors="pt")).logits
        np.testing.assert_allclose(row, truth, atol=1e-4)


def test_posteriors_of_several_pieces_and_extreme_logits():
    logits = np.array([[0, 1000.0], [3, 1], [0, 0]], np.float32)
    found = np.exp(log_posteriors(EmbeddedSet(logits, np.array([1, 2]))))
    soft = 1 / (1 + np.exp(-2))
    np.testing.assert_allclose(found, [[0, 1], [(soft + 0.5) / 2, (1.5 - soft) / 2]], atol=1e-12)
    p = log_posteriors(EmbeddedSet(np.array([[1000.0, 0], [0, -1000]]), np.ones(2, int)))
    assert np.isfinite(divergence(p, p[::-1])).all()
    p, q = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert divergence(p, q)[0] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))
