"""Chapter 11's small translator, trained by the page's own cells: no mistake on 1,000 unseen words, a map of a known answer."""
import matplotlib.pyplot as plt
import pytest
import torch
from planted import code_cells
from run_chapter import fresh, run

pytestmark = pytest.mark.slow
CELLS = {"setup", "shift", "fit", "backwards", "backwards-train", "share"}


@pytest.fixture(scope="module")
def page():
    """What the exported cells and those of the reversal leave behind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    values = fresh()
    with plt.rc_context():                   # the page sets its own fonts
        failed = run([(name, source) for name, source, exported in code_cells("encoder_decoder")
                      if name in CELLS or exported], values)
    torch.set_num_threads(threads)
    assert failed is None, f"cell {failed}: {values['_error']!r}"
    return values


def test_reversal_makes_no_mistake(page):
    """Greedy, from the start token alone; and a word that is not reversed would not do."""
    assert page["exact_one"] == 1.0
    unseen, answers = page["unseen"], page["answers"]
    assert len(unseen) == 1000 and (page["ids"] == answers).all()
    assert ((unseen != page["PAD"]).sum(1) + 2 == (answers != page["PAD"]).sum(1)).all()
    for word, answer in zip(unseen.tolist(), answers.tolist()):
        letters = [i for i in word if i != page["PAD"]]
        assert answer[:len(letters) + 2] == [page["BOS"], *letters[::-1], page["EOS"]]


def test_reversal_reads_its_source(page):
    """With sources of other rows nearly every answer is wrong: nothing was learned by heart."""
    ids, _ = page["written"](page["one"], page["unseen"].roll(1, 0), page["answers"].shape[1] - 1)
    assert (ids == page["answers"]).all(1).double().mean() < .01


def test_reversal_draws_the_anti_diagonal(page):
    """In every head, and far from what a shifted line would give."""
    looks, unseen = page["looks_one"][0], page["unseen"]
    assert min(page["shares_one"]) > .4
    assert max(page["on_gold"](looks.roll(1, 2), unseen)) < .3
    rows = looks.sum(-1)[:, :, :3]
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
    pads = (unseen == page["PAD"])[:, None, None].expand_as(looks)
    assert looks[pads].abs().max() == 0
