"""Encoders of texts: the published vectors of MiniLM, and TF-IDF that sees no test text."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import block, compose
from omegaconf import OmegaConf
from sklearn.feature_extraction.text import TfidfVectorizer
from text_tables import many, table
from torch import Tensor

from metarun.backbones.minilm import BertBlock, MiniLM
from metarun.data.text import Text, as_pieces
from metarun.data.tokens import LENGTH, model_folder, tokenize
from metarun.encoders.building import encoded
from metarun.encoders.encoded import training_items
from metarun.encoders.minilm import MiniLMEncoder
from metarun.encoders.tfidf import TfIdf
from metarun.errors import UserError
from metarun.runs.building import check_installed

SENTENCES = ["This is an example sentence", "Each sentence is converted"]
# As the model's card shows what sentence-transformers makes of these two.
PUBLISHED = [[0.06765690, 0.06349594, 0.04871313, 0.07930494], [0.08643861, 0.10276286, 0.00539444, 0.00204447]]


@pytest.fixture(scope="module")
def minilm() -> MiniLMEncoder:
    return MiniLMEncoder()


def test_vectors_are_the_published_ones(minilm: MiniLMEncoder) -> None:
    found = minilm(SENTENCES)
    assert found.shape == (2, 384)
    torch.testing.assert_close(found[:, :4], torch.tensor(PUBLISHED), atol=2e-4, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_what_a_text_is_encoded_with_changes_nothing(minilm: MiniLMEncoder) -> None:
    """Nor how far it is filled up."""
    alone = minilm(SENTENCES[:1])
    together = minilm([SENTENCES[0], "word " * 40, ""])
    torch.testing.assert_close(alone[0], together[0], atol=1e-6, rtol=0)
    assert together.isfinite().all()


@pytest.mark.parametrize("word", ["[PAD]", "[SEP]", "[CLS]", "[MASK]", "[UNK]"])
def test_a_text_with_a_word_of_the_tokenizers_own_is_read_as_it_stands(minilm: MiniLMEncoder, word: str) -> None:
    """It neither ends the text nor fills it up, so that another text beside it changes nothing."""
    text = f"a {word} river"
    pieces = tokenize([text], minilm.folder, "data")[0][0].tolist()
    own = tokenize([f"a [ {word[1:-1].lower()} ] river"], minilm.folder, "data")[0][0].tolist()
    assert pieces == own
    network = MiniLM((LENGTH,))
    alone, together = (torch.from_numpy(as_pieces(texts)).long() for texts in ([text], [text, "word " * 40]))
    torch.testing.assert_close(network(alone)[0], network(together)[0], atol=1e-6, rtol=0)


def test_long_texts_are_cut_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    minilm = MiniLMEncoder()
    texts = ["word " * 300, "short", "word " * 500]
    with caplog.at_level(logging.WARNING, "metarun"):
        found = minilm(texts), minilm(texts[2:])
        pieces, cut = tokenize(texts, minilm.folder, "data")
    assert cut == [0, 2]
    assert found[0].shape == (3, 384)
    assert pieces.shape == (3, LENGTH)
    assert pieces[0, -1] == pieces[2, -1] == pieces[1, 2]  # the mark of the end
    assert [record.getMessage() for record in caplog.records] == [
        "encoder: of texts longer than 256 word pieces the rest is not read; the first: "
        + repr(("word " * 12)[:59] + "…")
    ]


def test_a_block_is_attention_as_torch_has_it() -> None:
    """In float64, against torch's own layer with the same weights, padding left out."""
    torch.manual_seed(0)
    block = BertBlock().double().eval()
    other = torch.nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", 1e-12, batch_first=True).double()
    weights = {
        "self_attn.in_proj_weight": torch.cat([block.query.weight, block.key.weight, block.value.weight]),
        "self_attn.in_proj_bias": torch.cat([block.query.bias, block.key.bias, block.value.bias]),
    }
    for theirs, ours in (
        ("self_attn.out_proj", block.out), ("linear1", block.hidden), ("linear2", block.back),
        ("norm1", block.norm1), ("norm2", block.norm2),
    ):  # fmt: skip
        weights |= {f"{theirs}.weight": ours.weight, f"{theirs}.bias": ours.bias}
    other.load_state_dict(weights)
    x = torch.randn(2, 5, 384, dtype=torch.float64)
    absent = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    ours = block(x, absent[:, None, None])
    theirs = other(x, src_key_padding_mask=absent)
    torch.testing.assert_close(ours[~absent], theirs[~absent], atol=1e-10, rtol=1e-10)


def test_first_weights_that_a_checkpoint_replaces_may_be_gone(tmp_path: Path) -> None:
    config = compose("data=text", "data.root=texts.csv", "backbone=minilm", f"backbone.weights={tmp_path / 'gone'}")
    with pytest.raises(UserError, match=r"^backbone.weights=.*gone"):
        check_installed(config, [])
    config.checkpoint = "outputs/RUN"
    check_installed(config, [])


def test_weights_that_are_not_there_or_others_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"encoder.weights={tmp_path}: there is no model.safetensors in"):
        MiniLMEncoder(weights=str(tmp_path))
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=rf"^encoder.weights={tmp_path}: .*model.safetensors cannot be read"):
        _ = MiniLMEncoder(weights=str(tmp_path)).network
    with pytest.raises(UserError, match=r"encoder.length=600: must be from 3 to 512"):
        MiniLMEncoder(length=600)
    monkeypatch.setattr("metarun.data.tokens.PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"backbone.weights: .* pip install 'metarun\[text\]'"):
        MiniLM.check_installed({})
    monkeypatch.undo()
    encoder = MiniLMEncoder()
    with pytest.raises(UserError, match="other weights than those that the learner was trained with"):
        encoder.restore({**encoder.learned(), "weights": "0"}, {})


@pytest.mark.parametrize("reads", [["encoder=minilm", "backbone=mlp"], ["backbone=minilm"]])
def test_a_library_of_texts_that_is_missing_is_told_before_the_data_are_read(
    reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block("tokenizers", tmp_path, monkeypatch)
    with pytest.raises(
        UserError, match=r"\.weights: tokenizers cannot be imported \(blocked\): pip install 'metarun\[text\]'$"
    ):
        check_installed(compose("data=text", "data.root=texts.csv", *reads), [])


def test_safetensors_that_are_missing_name_what_brings_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block("safetensors", tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"safetensors cannot be imported \(blocked\): pip install 'metarun\[text\]'$"):
        MiniLM((LENGTH,))


def test_a_backbone_with_other_word_pieces_than_its_data_is_refused(tmp_path: Path) -> None:
    """Its texts would be read by the numbers of other words."""
    told = json.loads((model_folder("pretrained", "data") / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    MiniLM.check_installed({"weights": str(tmp_path)})
    other, pieces = tmp_path / "other", told["model"]["vocab"]
    pieces["river"], pieces["tower"] = pieces["tower"], pieces["river"]
    other.mkdir()
    (other / "model.safetensors").touch()
    (other / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^backbone.weights={other}: its tokenizer.json has other word pieces"):
        MiniLM.check_installed({"weights": str(other)})


def test_drawn_weights_take_gradients_of_a_text() -> None:
    torch.manual_seed(0)
    network = MiniLM((LENGTH,), weights=None)
    pieces = torch.from_numpy(tokenize(SENTENCES, model_folder("pretrained", "data"), "data")[0]).long()
    network(pieces).square()[:, :10].sum().backward()
    unused = {name for name, value in network.named_parameters() if value.grad is None}
    assert unused == set()


def test_tf_idf_is_scikit_learns_and_can_be_kept() -> None:
    texts = ["pay the bill", "pay the rent", "greet the guest", "the the the"]
    encoder = TfIdf(ngrams=[1, 2])
    encoder.fit(iter([texts[:2], texts[2:]]))
    wanted = TfidfVectorizer(ngram_range=(1, 2)).fit_transform(texts).toarray()
    np.testing.assert_allclose(encoder(texts), wanted, atol=1e-6)
    kept = TfIdf(ngrams=[1, 2])
    kept.restore(json.loads(json.dumps(encoder.learned())), {})
    torch.testing.assert_close(kept(["pay a guest", "unknown words"]), encoder(["pay a guest", "unknown words"]))
    assert not kept(["unknown words"]).any()
    assert kept.identity() == encoder.identity()
    with pytest.raises(UserError, match="no training text holds a word"):
        TfIdf().fit([["!", "?"]])
    with pytest.raises(UserError, match=r"encoder.ngrams=\[2, 1\]"):
        TfIdf(ngrams=[2, 1])


def fitted_to(sources: list[Text], *, as_target: bool = False) -> set[str]:
    return {text for chunk in training_items(sources[0], as_target=as_target) for text in chunk}


def test_no_test_text_is_seen_by_a_fit(tmp_path: Path) -> None:
    classes = table(tmp_path / "a.csv", many(list("abcdefghij")))
    source = Text(root=str(classes))
    names = {source.table.names[number] for number in source.splits["train"]}
    assert fitted_to([source]) == {text for text, label in many(list("abcdefghij")) if label in names}
    with pytest.raises(UserError, match="do not say which items are for training"):
        fitted_to([source], as_target=True)  # of a target each repeat tests other texts, of every class
    for part in ("train", "test"):
        table(tmp_path / f"parts/{part}.csv", many(list("abcde"), mark=f" {part}"))
    parts = Text(root=str(tmp_path / "parts"))
    assert fitted_to([parts], as_target=True) == {text for text, _ in many(list("abcde"), mark=" train")}
    few = table(tmp_path / "few.csv", many(list("ab")))
    with pytest.raises(UserError, match="do not say which items are for training"):
        fitted_to([Text(root=str(few))])


def test_a_target_alone_is_what_tf_idf_is_fitted_to(tmp_path: Path) -> None:
    for part in ("train", "test"):
        table(tmp_path / f"{part}.csv", many(list("abcde"), mark=f" {part}word"))
    node = OmegaConf.create({"_target_": "metarun.encoders.tfidf.TfIdf"})
    (found,) = encoded([Text(root=str(tmp_path))], node, as_target=True)
    terms = found.encoder.learned()["terms"]  # type: ignore[attr-defined]
    assert "trainword" in terms
    assert "testword" not in terms


def test_vectors_stay_where_they_were(minilm: MiniLMEncoder) -> None:
    """The encoder is the same network as the backbone."""
    pieces = torch.from_numpy(tokenize(SENTENCES, minilm.folder, "data")[0]).long()
    found: Tensor = MiniLM((LENGTH,))(pieces)
    torch.testing.assert_close(found, minilm(SENTENCES))
