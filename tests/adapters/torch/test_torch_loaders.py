"""Other people's savers and loaders, in the table of docs/modes.md."""

import re
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from unidrop import Key
from unidrop.adapters.torch import Dropout, assign_seeds

SITE = Key(42).fold_in("encoder/0")
CALLS = 3
PAGE = Path(__file__).parents[3] / "docs" / "modes.md"


class Net(nn.Module):
    """A network with any dropout."""

    def __init__(self, make):
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), make()

    def forward(self, x):
        return self.dropout(self.linear(x))


class StateDict:
    """torch.save, torch.load and load_state_dict."""

    @staticmethod
    def save(model, folder):
        torch.save(model.state_dict(), folder / "model.pt")

    @staticmethod
    def load(make, folder):
        model = Net(make)
        model.load_state_dict(torch.load(folder / "model.pt"))
        return model


class NotStrict(StateDict):
    """The same without strict keys."""

    @staticmethod
    def load(make, folder):
        model = Net(make)
        model.load_state_dict(torch.load(folder / "model.pt"), strict=False)
        return model


class Assigned(StateDict):
    """The same, with tensors that replace the meta tensors of a model."""

    @staticmethod
    def load(make, folder):
        with torch.device("meta"):
            model = Net(make)
        model.load_state_dict(torch.load(folder / "model.pt"), assign=True)
        return model


class Safetensors:
    """safetensors.torch.save_model and load_model."""

    @staticmethod
    def save(model, folder):
        pytest.importorskip("safetensors.torch").save_model(model, folder / "model.safetensors")

    @staticmethod
    def load(make, folder):
        model = Net(make)
        pytest.importorskip("safetensors.torch").load_model(model, folder / "model.safetensors")
        return model


class Accelerate(Safetensors):
    """Accelerate's load_checkpoint_and_dispatch, which sets one tensor after another."""

    @staticmethod
    def load(make, folder):
        accelerate = pytest.importorskip("accelerate")
        model, path = Net(make), str(folder / "model.safetensors")
        return accelerate.load_checkpoint_and_dispatch(model, path, device_map={"": "cpu"})


class Distributed:
    """torch.distributed.checkpoint, strict as it is by default."""

    planner = None

    @staticmethod
    def save(model, folder):
        dcp.save(model.state_dict(), checkpoint_id=folder)

    @classmethod
    def load(cls, make, folder):
        model = Net(make)
        state = model.state_dict()
        dcp.load(state, checkpoint_id=folder, planner=cls.planner and cls.planner())
        model.load_state_dict(state)
        return model


class DistributedPartial(Distributed):
    """The same with a planner that loads what there is."""

    planner = staticmethod(lambda: dcp.DefaultLoadPlanner(allow_partial_load=True))


class DistributedInPlace(Distributed):
    """The same, which writes into the state dictionary alone."""

    @staticmethod
    def load(make, folder):
        model = Net(make)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(model.state_dict(), checkpoint_id=folder, planner=planner)
        return model


class DistributedWrapped(Distributed):
    """get_model_state_dict and set_model_state_dict of a wrapped model."""

    @staticmethod
    def save(model, folder):
        dcp.save(get_model_state_dict(model), checkpoint_id=folder)

    @staticmethod
    def load(make, folder):
        model = Net(make)
        wrapped = torch.compile(model, backend="eager")
        state = get_model_state_dict(wrapped)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(state, checkpoint_id=folder, planner=planner)
        set_model_state_dict(wrapped, state)
        return model


class Transformers:
    """save_pretrained and from_pretrained, which makes a model without memory."""

    options: ClassVar = {}

    @staticmethod
    def network(make):
        transformers = pytest.importorskip("transformers")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

        class Model(transformers.PreTrainedModel):
            config_class = transformers.PretrainedConfig

            def __init__(self, config):
                super().__init__(config)
                self.linear, self.dropout = nn.Linear(4, 4), make()
                self.post_init()

            forward = Net.forward

        return Model

    @classmethod
    def save(cls, model, folder):
        network = cls.network(lambda: model.dropout)
        saved = network(network.config_class())
        saved.linear = model.linear
        saved.save_pretrained(folder)

    @classmethod
    def load(cls, make, folder):
        return cls.network(make).from_pretrained(folder, **cls.options)


class TransformersMapped(Transformers):
    """The same with device_map and another dtype."""

    options: ClassVar = {"device_map": "cpu", "dtype": torch.bfloat16}


class Lightning:
    """Lightning's Trainer.save_checkpoint and LightningModule.load_from_checkpoint."""

    @staticmethod
    def network(make):
        lightning = pytest.importorskip("lightning")

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.linear, self.dropout = nn.Linear(4, 4), make()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

            def training_step(self, batch, index):
                return self.dropout(self.linear(batch)).sum()

        return Module

    @classmethod
    def save(cls, model, folder):
        lightning = pytest.importorskip("lightning")
        module = cls.network(lambda: model.dropout)()
        module.linear = model.linear
        trainer = lightning.Trainer(
            max_steps=0,
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.strategy.connect(module)
        trainer.save_checkpoint(folder / "model.ckpt")

    @classmethod
    def load(cls, make, folder):
        return cls.network(make).load_from_checkpoint(folder / "model.ckpt")


LOADERS = {
    "`load_state_dict`": StateDict,
    "`load_state_dict(strict=False)`": NotStrict,
    '`load_state_dict(assign=True)` of a model on `"meta"`': Assigned,
    "`safetensors.torch.load_model`": Safetensors,
    "Accelerate's `load_checkpoint_and_dispatch(device_map=...)`": Accelerate,
    "`torch.distributed.checkpoint.load`": Distributed,
    "the same with `DefaultLoadPlanner(allow_partial_load=True)`": DistributedPartial,
    "the same, without `load_state_dict` afterwards": DistributedInPlace,
    "`set_model_state_dict` of a compiled model": DistributedWrapped,
    "Transformers' `from_pretrained`": Transformers,
    "the same with `device_map` and `dtype`": TransformersMapped,
    "Lightning's `load_from_checkpoint`": Lightning,
}
DIRECTIONS = [
    (nn.Dropout, lambda: Dropout(seed=SITE)),
    (lambda: Dropout(seed=SITE), lambda: Dropout(seed=SITE)),
    (lambda: Dropout(seed=SITE), nn.Dropout),
]


def describe(loader, saved, loaded, folder):
    """Save a model after some calls, load it, and return a cell of the table."""
    model = Net(saved)
    for _ in range(CALLS):
        model(torch.ones(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader.save(model, folder)
        try:
            result = loader.load(loaded, folder)
        except (Exception, dcp.api.CheckpointException) as error:
            names = re.findall(r"\b_extra_state\b", str(error))
            assert names
            return f"error that names `{names[0]}`"
    assert torch.equal(result.linear.weight.float(), model.linear.weight.to(result.linear.weight))
    if isinstance(result.dropout, Dropout):
        return f"`calls` is {'saved' if (n := int(result.dropout.calls)) == CALLS else n}"
    return "loads"


def rows_of_page():
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("| loader |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.slow
@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", LOADERS)
def test_does_what_page_says(name, tmp_path):
    actual = []
    for i, (saved, loaded) in enumerate(DIRECTIONS):
        folder = tmp_path / str(i)
        folder.mkdir()
        actual.append(describe(LOADERS[name], saved, loaded, folder))
    assert actual == rows_of_page()[name]


def test_names_every_loader_on_page():
    assert list(rows_of_page()) == list(LOADERS)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_loads_by_default_before_seeds_are_assigned(tmp_path):
    saved, model = Net(nn.Dropout), Net(Dropout)
    dcp.save(saved.state_dict(), checkpoint_id=tmp_path)
    dcp.load(model.state_dict(), checkpoint_id=tmp_path)
    assert torch.equal(model.linear.weight, saved.linear.weight)
    assert int(assign_seeds(model, 42).dropout.calls) == 0
