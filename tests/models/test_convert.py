"""`models.convert`: what we export, transformers loads, and the other way round."""

import json
import logging
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.bert import Bert, BertConfig
from models.convert import from_hugging_face, to_hugging_face
from preprocessing.vocabulary import PROTTRANS_BERT, RESIDUES

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers

TINY = BertConfig(hidden_size=32, layers=2, heads=4, intermediate_size=48, max_positions=120)
PROTEINS = (
    "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",  # ubiquitin
    "GIVEQCCTSICSLYQLENYCN",  # insulin, A chain
    "MCAAQUSAAJBRZOLYPKEX",  # every residue that becomes X, and X
)


def random_model(config=TINY, seed=0):
    torch.manual_seed(seed)
    model = Bert(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def export(model, directory, vocabulary=PROTTRANS_BERT):
    to_hugging_face(
        model.state_dict(), model.config, vocabulary.tokens, vocabulary.substitutes, directory
    )


def our_ids(protein):
    table = PROTTRANS_BERT.lookup_table()
    residues = [int(table[ord(residue)]) for residue in protein]
    return [PROTTRANS_BERT.id_of("[CLS]"), *residues, PROTTRANS_BERT.id_of("[SEP]")]


def our_batch(proteins):
    ids = [our_ids(protein) for protein in proteins]
    tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64)
    for row, one in zip(tokens, ids, strict=True):
        row[: len(one)] = torch.tensor(one)
    return tokens, torch.tensor([len(one) for one in ids])


@pytest.fixture
def checkpoint(tmp_path):
    """A directory that transformers saved, and the model that it holds."""
    torch.manual_seed(1)
    reference = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=30,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=120,
        )
    ).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", reference


def edit_weights(directory, edit):
    path = directory / "model.safetensors"
    weights = edit(load_file(path))
    save_file(weights, path, metadata={"format": "pt"})


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same_logits(directory, reference):
    config, state = from_hugging_face(directory)
    model = Bert(config).eval()
    model.load_state_dict(state)
    tokens, lengths = our_batch(PROTEINS)
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        expected = reference(input_ids=tokens, attention_mask=real.long()).logits
        torch.testing.assert_close(
            model(tokens, lengths)[real], expected[real], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("spelling", [str, " ".join, str.lower])
def test_exported_model_gives_our_logits_in_transformers(tmp_path, spelling):
    model = random_model()
    export(model, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    reference, report = transformers.BertForMaskedLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    assert reference.config.architectures == ["BertForMaskedLM"]

    batch = tokenizer(
        [spelling(protein) for protein in PROTEINS], padding=True, return_tensors="pt"
    )
    tokens, lengths = our_batch(PROTEINS)
    assert torch.equal(batch["input_ids"], tokens)
    assert torch.equal(batch["attention_mask"].sum(1), lengths)
    with torch.no_grad():
        theirs = reference.eval()(**batch).logits
        ours = model(tokens, lengths)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)


def test_exported_tokenizer_knows_every_letter_in_either_case(tmp_path):
    export(random_model(), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for residue in RESIDUES:
        for letter in (residue, residue.lower()):
            assert tokenizer(letter)["input_ids"] == our_ids(residue), letter
    assert tokenizer("M [MASK] k")["input_ids"] == [2, 21, 4, 12, 3]
    assert tokenizer("M*")["input_ids"] == [2, 21, 1, 3]
    assert tokenizer("MK", "T")["input_ids"] == [2, 21, 12, 3, 15, 3]
    assert tokenizer("MK", "T")["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    assert tokenizer.model_max_length == TINY.max_positions


def test_classic_tokenizer_reads_spaced_capitals(tmp_path):
    export(random_model(), tmp_path / "out")
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(" ".join(PROTEINS[0]))["input_ids"] == our_ids(PROTEINS[0])


def test_transformers_checkpoint_gives_its_logits_here(checkpoint):
    assert_same_logits(*checkpoint)


def test_sharded_checkpoint_is_read(checkpoint, tmp_path):
    _, reference = checkpoint
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert_same_logits(tmp_path / "shards", reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise(tmp_path, dtype):
    model = random_model(BertConfig(**{**vars(TINY), "dropout": 0.1, "token_types": 1})).to(dtype)
    export(model, tmp_path / "once")
    config, state = from_hugging_face(tmp_path / "once")
    assert config == model.config
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], tensor), name

    export(model, tmp_path / "twice")
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes(), path.name


def test_pooler_and_next_sentence_head_are_left_out_with_a_note(checkpoint, tmp_path, caplog):
    _, masked_lm = checkpoint
    reference = transformers.BertForPreTraining(masked_lm.config)
    reference.bert.load_state_dict(masked_lm.bert.state_dict(), strict=False)
    reference.cls.predictions.load_state_dict(masked_lm.cls.predictions.state_dict())
    reference.save_pretrained(tmp_path / "pretraining")
    with caplog.at_level(logging.WARNING):
        assert_same_logits(tmp_path / "pretraining", masked_lm)
    assert "bert.pooler.dense.weight" in caplog.text
    assert "cls.seq_relationship.bias" in caplog.text


def test_bare_encoder_is_read_and_its_missing_head_noted(checkpoint, tmp_path, caplog):
    _, reference = checkpoint
    reference.bert.save_pretrained(tmp_path / "encoder")
    with caplog.at_level(logging.WARNING):
        config, state = from_hugging_face(tmp_path / "encoder")
    assert "no masked-LM head" in caplog.text
    model = Bert(config).eval()
    model.load_state_dict(state)
    tokens, _ = our_batch(PROTEINS[:1])
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode(tokens), reference.bert(tokens).last_hidden_state, rtol=1e-5, atol=1e-5
        )
    assert state["head_dense.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_names_of_old_checkpoints_are_read(checkpoint):
    directory, reference = checkpoint

    def older(weights):
        weights = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for name, tensor in weights.items()
        }
        word_embeddings = weights["bert.embeddings.word_embeddings.weight"]
        weights["cls.predictions.decoder.weight"] = word_embeddings.clone()
        weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
        weights["bert.embeddings.position_ids"] = torch.arange(120)[None]
        return weights

    edit_weights(directory, older)
    assert_same_logits(directory, reference)


def test_missing_keys_of_the_configuration_take_the_defaults_of_transformers(checkpoint):
    directory, reference = checkpoint
    path = directory / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if "dropout" not in k}))
    config, _ = from_hugging_face(directory)
    assert config.dropout == reference.config.hidden_dropout_prob
    assert config.attention_dropout == reference.config.attention_probs_dropout_prob


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type 'roberta': only 'bert'"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new': only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 64}, r"word_embeddings.weight .* \(30, 32\), .* asks for \(30, 64\)"),
        ({"num_hidden_layers": 3}, "lacks bert.encoder.layer.2.*and 13 more"),
        ({"num_hidden_layers": 1}, "has the unknown bert.encoder.layer.1.*and 13 more"),
    ],
)
def test_other_architectures_are_refused(checkpoint, changes, message):
    directory, _ = checkpoint
    edit_config(directory, **changes)
    with pytest.raises(ValueError, match=message):
        from_hugging_face(directory)


def test_missing_part_of_a_fused_tensor_is_named(checkpoint):
    directory, _ = checkpoint
    missing = "bert.encoder.layer.1.attention.self.key.bias"
    edit_weights(directory, lambda w: {name: t for name, t in w.items() if name != missing})
    with pytest.raises(ValueError, match=f"lacks {missing}"):
        from_hugging_face(directory)


def test_untied_decoder_is_refused(checkpoint):
    directory, _ = checkpoint
    edit_weights(directory, lambda w: w | {"cls.predictions.decoder.weight": torch.zeros(30, 32)})
    with pytest.raises(ValueError, match=r"decoder.weight .* differs from bert.embeddings"):
        from_hugging_face(directory)


def test_pickled_weights_are_refused_unread(checkpoint, tmp_path):
    directory, _ = checkpoint

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "code-was-run"),))

    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"only in pytorch_model.bin, a pickle.*convert it once"):
        from_hugging_face(directory)
    assert not (tmp_path / "code-was-run").exists()


def test_damaged_and_missing_files_are_refused(checkpoint, tmp_path):
    directory, _ = checkpoint
    with pytest.raises(ValueError, match=r"config.json does not exist: name the directory"):
        from_hugging_face(tmp_path)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors is missing or damaged"):
        from_hugging_face(directory)
    weights.unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        from_hugging_face(directory)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-1.safetensors is missing or damaged"):
        from_hugging_face(directory)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        from_hugging_face(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        from_hugging_face(directory)


def test_export_never_overwrites(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists already: export to a new or an empty directory"):
        export(random_model(), tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        export(random_model(), tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_export_fills_an_empty_directory_readable_by_the_group(tmp_path):
    (tmp_path / "a" / "out").mkdir(parents=True)
    export(random_model(), tmp_path / "a" / "out")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    files = {path.name: path.stat().st_mode for path in (tmp_path / "a" / "out").iterdir()}
    assert set(files) == {
        "model.safetensors",
        "config.json",
        "vocab.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert len(set(files.values())) == 1


def test_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("models.convert.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(random_model(), tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (PROTTRANS_BERT.tokens[:-1], "29 tokens but vocab_size is 30"),
        ((*PROTTRANS_BERT.tokens[:4], "<mask>", *PROTTRANS_BERT.tokens[5:]), r"lacks \[MASK\]"),
        (
            ("[UNK]", "[PAD]", *PROTTRANS_BERT.tokens[2:]),
            r"pad_id 0 is '\[UNK\]'.* set pad_id to 1",
        ),
    ],
)
def test_vocabulary_that_does_not_fit_is_refused(tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        to_hugging_face(random_model().state_dict(), TINY, tokens, {}, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_state_that_does_not_fit_is_refused(tmp_path):
    state = random_model().state_dict()
    del state["head_bias"]
    with pytest.raises(ValueError, match="the model's state lacks head_bias"):
        to_hugging_face(state, TINY, PROTTRANS_BERT.tokens, {}, tmp_path / "out")
    assert not any(tmp_path.iterdir())
