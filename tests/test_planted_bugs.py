"""Every bug of the named list dies twice, and the report in the book says where."""
import planted
import pytest
from run_chapter import all_killed_by_cells


@pytest.mark.slow
def test_every_planted_bug_is_caught_by_its_chapter_and_by_the_tests():
    chapter, tests = all_killed_by_cells(planted.BUGS), planted.all_killed_by_tests()
    assert [name for name, cell in chapter.items() if cell is None] == [], "bugs that the chapter does not notice"
    assert [name for name, test in tests.items() if test in (None, "import")] == [], "bugs that the tests do not notice"
    assert planted.REPORT.read_text() == planted.report(chapter, tests), "rewrite it with: python tests/planted.py"


def test_the_list_is_sound():
    assert len({bug.name for bug in planted.BUGS}) == len(planted.BUGS)
    for bug in planted.BUGS:
        source = (planted.ROOT / f"attn_nb/{bug.module}.py").read_text()
        compile(bug.plant(source), bug.module, "exec")
    with pytest.raises(ValueError, match="occurs 0 times"):
        planted.Bug("typo", "single_head", "no such code", "").plant("x = 1")
