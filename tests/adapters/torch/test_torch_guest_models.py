"""Whole models of other packages train, save, load, and continue as if they had never stopped."""

import copy

import pytest
import torch
from torch import nn
from torch_tensors import patterns

from unidrop.adapters.torch import Dropout, assign_seeds

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "torchvision")]
P = 0.3


def replace(model):
    """Replace each dropout layer of a model by ours, with a seed."""
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if type(layer) is nn.Dropout:
            model.set_submodule(name, Dropout(layer.p, layer.inplace))
    return assign_seeds(model, 42)


def numbers(model):
    """Return the call numbers of the layers that drop."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Dropout)}
    return {name: int(layer.calls) for name, layer in layers.items() if layer.p}


def make_optimizer(model):
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)


def train(model, optimizer, steps, loss_of):
    """Train some steps, and return the losses."""
    losses = []
    for step in steps:
        loss = loss_of(model.train(), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_equal(model, other):
    """Compare the call numbers and the bits of the weights of two models."""
    assert numbers(model) == numbers(other)
    for weight, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert patterns(weight) == patterns(expected)


def check_resumes(model, loss_of, save_and_load, path):
    """Compare a run that is saved and loaded after 2 of 4 steps with one that never stops."""
    never_stopped, optimizer = copy.deepcopy(model), make_optimizer(model)
    losses = train(never_stopped, make_optimizer(never_stopped), range(4), loss_of)
    assert len(set(losses)) == 4
    assert train(model, optimizer, range(2), loss_of) == losses[:2]
    torch.save(optimizer.state_dict(), path / "optimizer.pt")

    torch.manual_seed(1)  # another start than the one of the model
    loaded = save_and_load(model)
    assert numbers(loaded) == numbers(model)
    assert set(numbers(loaded).values()) == {2}
    optimizer = make_optimizer(loaded)
    optimizer.load_state_dict(torch.load(path / "optimizer.pt"))
    assert train(loaded, optimizer, range(2, 4), loss_of) == losses[2:]
    check_equal(loaded, never_stopped)
    return loaded, never_stopped


# --- Transformers and PEFT ------------------------------------------------------------------------


@pytest.fixture
def transformers():
    found = pytest.importorskip("transformers")
    found.utils.logging.set_verbosity_error()
    found.utils.logging.disable_progress_bar()
    return found


def make_gpt2(transformers):
    # Attention would drop by PyTorch's functions.
    return transformers.GPT2LMHeadModel, transformers.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=P, embd_pdrop=P, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip


def make_bert(transformers):
    return transformers.BertForMaskedLM, transformers.BertConfig(
        vocab_size=32, max_position_embeddings=8, hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=P, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def loss_of_text(model, generator):
    ids = torch.randint(0, 32, (4, 8), generator=generator)
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("make", [make_gpt2, make_bert])
def test_resumes_by_from_pretrained(make, transformers, tmp_path):
    cls, config = make(transformers)

    class Replaced(cls):
        def __init__(self, config):
            super().__init__(config)
            replace(self)

    def save_and_load(model):
        model.save_pretrained(tmp_path)
        return Replaced.from_pretrained(tmp_path)

    torch.manual_seed(0)
    check_resumes(Replaced(config), loss_of_text, save_and_load, tmp_path)


@pytest.mark.parametrize("make", [make_gpt2, make_bert])
def test_resumes_by_file_of_transformers(make, transformers, tmp_path):
    cls, config = make(transformers)

    def save_and_load(model):
        model.save_pretrained(tmp_path)
        loaded = replace(cls.from_pretrained(tmp_path))
        assert set(numbers(loaded).values()) == {0}  # nothing has read them
        safetensors = pytest.importorskip("safetensors.torch")
        loaded.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=False)
        return loaded

    torch.manual_seed(0)
    check_resumes(replace(cls(config)), loss_of_text, save_and_load, tmp_path)


def test_resumes_by_trainer_of_transformers(transformers, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs it")
    cls, config = make_gpt2(transformers)
    ids = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]

    def fit(model, steps, checkpoint=None):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=2, logging_steps=1,
            per_device_train_batch_size=4, lr_scheduler_type="constant", use_cpu=True,
            disable_tqdm=True, report_to=[],
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=checkpoint)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    torch.manual_seed(0)
    never_stopped = replace(cls(config))
    model = copy.deepcopy(never_stopped)
    losses = fit(never_stopped, 4)
    assert fit(model, 2) == losses[:2]
    torch.manual_seed(1)
    loaded = replace(cls(config))
    assert fit(loaded, 4, str(tmp_path / "checkpoint-2")) == losses
    assert set(numbers(loaded).values()) == {4}
    check_equal(loaded, never_stopped)


# Transformers warns of a name that PEFT uses.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_resumes_with_lora(transformers, tmp_path):
    peft = pytest.importorskip("peft")
    cls, config = make_gpt2(transformers)
    torch.manual_seed(0)
    base = cls(config)
    base.save_pretrained(tmp_path / "base")
    adapter = peft.LoraConfig(
        r=2, lora_dropout=P, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )

    def save_and_load(model):
        model.save_pretrained(tmp_path / "adapter")
        state = {k: v for k, v in model.state_dict().items() if k.endswith("_extra_state")}
        torch.save(state, tmp_path / "calls.pt")

        base = cls.from_pretrained(tmp_path / "base")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        replace(loaded)
        assert set(numbers(loaded).values()) == {0}  # nothing has read them
        loaded.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
        for name, number in numbers(loaded).items():
            assert number == (2 if "lora_dropout" in name else 0)
        loaded.load_state_dict(torch.load(tmp_path / "calls.pt"), strict=False)
        return loaded

    model = replace(peft.get_peft_model(base, adapter))
    loaded, never_stopped = check_resumes(model, loss_of_text, save_and_load, tmp_path)

    merged, expected = (model.merge_and_unload() for model in (loaded, never_stopped))
    assert set(numbers(merged).values()) == {4}
    step = torch.Generator().manual_seed
    assert loss_of_text(merged.train(), step(4)) == loss_of_text(expected.train(), step(4))


# --- timm -----------------------------------------------------------------------------------------


def test_resumes_vision_transformer(tmp_path):
    timm = pytest.importorskip("timm")

    def make():
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2,
            num_classes=3, drop_rate=P, pos_drop_rate=P, proj_drop_rate=P, attn_drop_rate=P,
        )  # fmt: skip
        for block in model.blocks:
            block.attn.fused_attn = False  # which would drop by PyTorch's function
        return replace(model)

    def loss_of(model, generator):
        images = torch.randn(4, 3, 16, 16, generator=generator)
        return nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))

    def save_and_load(model):
        torch.save(model.state_dict(), tmp_path / "model.pt")
        loaded = make()
        loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
        return loaded

    torch.manual_seed(0)
    model = make()
    assert len(numbers(model)) == 2 + 4 * 2
    check_resumes(model, loss_of, save_and_load, tmp_path)


# --- Lightning ------------------------------------------------------------------------------------


# Lightning warns that it reads data in one process, and PyTorch warns of a name that it uses.
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
def test_resumes_by_trainer_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=P, batch_first=True)
            layer.self_attn.dropout = 0.0  # which would drop by PyTorch's function
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.losses = []
            replace(self)

        def configure_optimizers(self):
            return make_optimizer(self)

        def training_step(self, batch, index):
            loss = self.encoder(batch).square().mean()
            self.losses.append(loss.item())
            return loss

    def fit(module, epochs, **options):
        trainer = lightning.Trainer(
            max_epochs=epochs,
            logger=False,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        data = torch.randn(8, 4, 8, generator=torch.Generator().manual_seed(0))
        batches = torch.utils.data.DataLoader(data, batch_size=4)  # 2 an epoch
        trainer.fit(module, batches, **options)
        return trainer

    torch.manual_seed(0)
    module = Module()
    never_stopped = copy.deepcopy(module)
    fit(never_stopped, 2)
    fit(module, 1).save_checkpoint(tmp_path / "model.ckpt")
    torch.manual_seed(1)
    loaded = Module()
    fit(loaded, 2, ckpt_path=tmp_path / "model.ckpt")
    assert module.losses + loaded.losses == never_stopped.losses
    assert set(numbers(loaded).values()) == {4}
    check_equal(loaded, never_stopped)
