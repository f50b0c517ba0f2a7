import pytest

from bt_ray.errors import ConfigError
from bt_ray.strategy import PAPER, StageNode, expand, parse, tree

STEPS = ["p", "w", "polish"]


@pytest.mark.parametrize("text", ["p->w", "p -> w", " p ->w "])
def test_arrow_with_or_without_spaces(text):
    assert parse(text, STEPS) == ("p", "w")


def test_vanilla_is_the_empty_strategy():
    assert parse("vanilla", STEPS) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("p, w", "A comma could mean two"),
        ("p;w", "other than '->'"),
        ("p -> ", "no step beside it"),
        ("-> p", "no step beside it"),
        ("", "is empty"),
        ("p -> polsh", "did you mean 'polish'"),
        ("p w", "no step name"),
        ("p -> q", "the step 'q', which `steps` lacks. It has: p, polish, w."),
    ],
)
def test_bad_text_says_why(text, says):
    with pytest.raises(ConfigError) as error:
        parse(text, STEPS)
    assert says in str(error.value)


def test_tree_shares_prefixes_and_puts_parents_first():
    nodes = tree([("p", "w", "p"), ("p", "w"), ("w",)])
    assert [node.id for node in nodes] == ["vanilla", "p", "w", "p.w", "p.w.p"]
    assert [node.id for node in nodes if node.parent == nodes[0]] == ["p", "w"]
    assert StageNode(("p", "w")).parent == StageNode(("p",))
    assert StageNode(("p", "w")).path == "p -> w"


def test_paper_is_the_eight_rows():
    nodes = tree(expand("paper", STEPS))
    assert len(PAPER) + 1 == 8
    assert {node.path for node in nodes} == {"vanilla", *PAPER}


def test_paper_in_a_list_stands_for_its_rows_and_each_strategy_counts_once():
    found = expand(["p -> p", "paper", "polish"], STEPS)
    assert len(found) == len(PAPER) + 1 and found[0] == ("p", "p") and found[-1] == ("polish",)
    assert set(found) == {*expand("paper", STEPS), ("polish",)}


def test_one_list_of_strategies():
    assert expand(["p", "p -> w"], STEPS) == [("p",), ("p", "w")]
    with pytest.raises(ConfigError, match="list is empty"):
        expand([], STEPS)
