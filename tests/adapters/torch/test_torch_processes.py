"""Dropout of PyTorch in further processes: two ranks, and runs that are saved and resumed."""

import subprocess
import sys

import pytest
import torch

from unidrop import Key, keep_mask
from unidrop.adapters.torch import Dropout

pytestmark = pytest.mark.slow  # each process imports PyTorch

SITE = Key(42).fold_in("encoder/0")


def get_kept(call, shape, site=SITE):
    """Return which elements a call keeps, as the scripts print it."""
    return "".join(str(int(keep)) for keep in keep_mask(shape, 0.5, site.fold_in(call)).flat)


# --- Two ranks -----------------------------------------------------------------------------------

TWO_RANKS = """
import sys, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from unidrop import Key
from unidrop.adapters.torch import Dropout

rank = int(sys.argv[1])
store = torch.distributed.FileStore(sys.argv[2], 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
model = nn.Sequential(nn.Linear(1, 1), Dropout(seed=Key(42).fold_in("encoder/0").fold_in(rank)))
model[1].calls = 10 * rank  # rank 0's is what each of them has
distributed = DistributedDataParallel(model)
for _ in range(2):
    y = distributed(torch.ones(64, 1))
    y.sum().backward()
    print(int(model[1].calls), "".join(str(int(u != 0)) for u in y.flatten()))
torch.distributed.destroy_process_group()
"""


def test_gives_ranks_one_call_number_and_their_own_masks(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        printed, _ = process.communicate(timeout=300)
        expected = [
            f"{step + 1} {get_kept(step, (64, 1), SITE.fold_in(rank))}" for step in range(2)
        ]
        assert printed.splitlines() == expected


# --- Runs that are resumed -----------------------------------------------------------------------

RESUMED = """
import sys, torch
from unidrop import Key
from unidrop.adapters.torch import Dropout

module = Dropout(seed=Key(42).fold_in("encoder/0"))
module.load_state_dict(torch.load(f"{sys.argv[1]}/state.pt"), strict=True)
program = torch.export.load(f"{sys.argv[1]}/program.pt2").module()
for call in (module, program):
    for _ in range(2):
        print("".join(str(int(u != 0)) for u in call(torch.ones(3, 64)).flatten()))
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Return what a new process makes of a module's state, and of an exported program."""
    folder = tmp_path_factory.mktemp("resumed")
    module = Dropout(seed=SITE)
    for _ in range(3):
        module(torch.ones(64))
    torch.save(module.state_dict(), folder / "state.pt")
    program = torch.export.export(Dropout(seed=SITE), (torch.ones(3, 64),))
    torch.export.save(program, folder / "program.pt2")
    done = subprocess.run(
        [sys.executable, "-c", RESUMED, str(folder)], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_resumes_state_in_new_process(resumed):
    assert resumed[:2] == [get_kept(call, (3, 64)) for call in (3, 4)]


def test_resumes_exported_program_in_new_process(resumed):
    assert resumed[2:] == [get_kept(call, (3, 64)) for call in (0, 1)]
