"""Options: every mistake is found, at once, with its path, its value and what was expected."""

import dataclasses
import re

import pytest

from strata import (
    ConfigError,
    base,
    components,
    implementation,
    lookup,
    option,
    options,
    part,
    parts,
    register,
    resolve,
    section,
    to_tree,
)
from strata.registry import _components
from strata.values import Mismatch, Text, coerce


@register("test.paint", "gloss")
@options
class Gloss:
    """Shiny."""

    layers: int = option(2, "coats", least=1, most=9)
    tint: float | None = option(None, "share of colour", least=0, most=1)


@register("test.paint", "matt")
@options
class Matt:
    """Dull."""

    layers: int = option(1, "coats", least=1)
    grain: str = option("fine", "of the powder", among=("fine", "coarse"))


@options
class Wall:
    """A wall."""

    height: float = option(2.5, "metres", above=0)
    paint: object = part("test.paint", "gloss", "what covers it")
    under: object = part("test.paint", None, "what lies below")
    stripes: tuple = parts("test.paint", "more paints")
    sizes: tuple[int, ...] = option((), "of stripes, in metres", above=0)

    def problems(self):
        """A wall is not all paint."""
        if self.height < self.paint.layers:
            yield "height", f"{self.paint.layers} layers are higher than the wall"


@options
class House:
    """A house."""

    wall: Wall = section(Wall, "its wall")
    number: int = option(1, "in the street", key="cosmetic")

    def problems(self):
        """Asks the wall for what only a possible wall has."""
        if self.wall.height - self.wall.paint.layers < 0:
            raise ZeroDivisionError("paint as high as the wall")
        yield from ()


def problems(cls, tree):
    return {problem.path: str(problem) for problem in resolve(cls, tree)[1].problems}


def test_an_empty_tree_gives_the_defaults():
    house, found = resolve(House, {})
    assert house == House() and not found.problems
    assert isinstance(house.wall.paint, Gloss) and house.wall.under is None
    assert {"wall.height", "wall.paint.name", "wall.paint.layers", "number"} <= set(found.filled)


def test_options_are_frozen_and_hashable():
    house = House()
    with pytest.raises(dataclasses.FrozenInstanceError):
        house.number = 2
    assert hash(house) == hash(House())


def test_all_mistakes_are_reported_at_once_with_full_paths():
    tree = {
        "nmber": 3,
        "number": "x",
        "wall": {
            "hieght": 1,
            "height": -1.0,
            "paint": {"name": "gloss", "layers": 1.5, "grain": "fine"},
            "under": {"name": "mat"},
        },
    }
    found = problems(House, tree)
    assert set(found) == {
        "nmber", "number", "wall.hieght", "wall.height", "wall.paint.layers", "wall.paint.grain", "wall.under.name",
    }  # fmt: skip
    assert "did you mean number" in found["nmber"] and "did you mean wall.height" in found["wall.hieght"]
    assert "above 0" in found["wall.height"] and "-1.0" in found["wall.height"]
    assert "expected an integer, at least 1, at most 9" in found["wall.paint.layers"] and "1.5" in found["wall.paint.layers"]
    assert "field of matt" in found["wall.paint.grain"]
    assert "did you mean matt" in found["wall.under.name"]


def test_a_misspelt_name_of_a_component_is_suggested():
    text = problems(House, {"wall": {"paint": {"nane": "matt"}}})["wall.paint.nane"]
    assert "did you mean wall.paint.name?" in text and "Fields here: name, layers" in text


def test_a_problem_names_the_file_and_line_that_define_the_field():
    text = problems(House, {"wall": {"height": 0}})["wall.height"]
    place = text.partition("defined in ")[2].rstrip(")")
    name, line = place.rsplit(":", 1)
    assert name.endswith("test_resolve.py")
    with open(__file__) as file:
        assert "height: float" in file.readlines()[int(line) - 1]


def test_combinations_are_checked_beside_a_misspelt_neighbour():
    assert set(problems(House, {"wall": {"colour": 1, "height": 0.5}})) == {"wall.colour", "wall.height"}


def test_combinations_are_not_checked_against_stand_ins_for_wrong_values():
    assert set(problems(House, {"wall": {"height": 0.5, "paint": {"layers": 99}}})) == {"wall.paint.layers"}


@options
class Street:
    """A street."""

    houses: int = option(2, "on each side", least=1)
    lamps: int = option(4, "in all", least=0)
    trees: int = option(0, "in all", least=0)
    first: House = section(House, "the corner")

    def problems(self):
        """Three checks, each of which reads other fields."""
        yield self.of_lamps()
        yield self.of_trees()
        if self.first.number > self.houses:
            yield "first.number", "there are not so many houses"

    def of_lamps(self):
        """Reads houses first, so that everything after it waits when that is wrong."""
        if self.houses > self.lamps:
            yield "lamps", "every house has a lamp"
        if self.lamps > 8:
            yield "lamps", "too bright"

    def of_trees(self):
        """Reads the trees alone."""
        if self.trees == 13:
            yield "trees", "an unlucky number"


def test_a_wrong_value_holds_back_the_checks_that_read_it_and_no_other():
    assert set(problems(Street, {"houses": 9, "trees": 13})) == {"lamps", "trees"}
    assert set(problems(Street, {"houses": "x", "trees": 13, "lamps": 99})) == {"houses", "trees"}
    assert set(problems(Street, {"lamps": -1, "trees": 13, "first": {"number": 5}})) == {"lamps", "trees", "first.number"}


def test_a_section_with_a_wrong_value_is_asked_for_its_right_ones():
    tree = {"first": {"number": 5, "wall": {"height": 0.0}}}
    assert set(problems(Street, tree)) == {"first.number", "first.wall.height"}


@options
class Shop:
    """A shop, whose checks are written in other ways."""

    paints: tuple = parts("test.paint", "on sale")
    main: object = part("test.paint", "sold out", "not registered anywhere")
    words: str = option("a", "anything", among=("a", "b"))
    size: int = option(1, "rooms", least=1)
    doors: int = option(1, "doors", least=1)

    def problems(self):
        """No generator; one of its checks catches what it likes, one points at a list of components."""
        return [self.of_words(), self.of_paints(), *([("size", "too small")] if self.size < self.doors else [])]

    def of_words(self):
        """Catches every `Exception`."""
        try:
            len(self.words)
        except Exception as error:
            yield "words", str(error)

    def of_paints(self):
        """About all of them."""
        if len(self.paints) > 1:
            yield "paints", "one is enough"


def test_checks_that_wait_cannot_be_caught_shown_or_built_by_accident():
    tree = {"words": "c", "main": {"name": "gloss"}, "paints": [{"name": "gloss", "layers": 0}, {"name": "matt"}]}
    assert set(problems(Shop, tree)) == {"words", "paints.0.layers", "paints"}
    assert set(problems(Shop, {"main": {"name": "gloss"}, "size": 2, "doors": 5})) == {"size"}
    assert set(problems(Shop, {"main": {"name": "gloss"}, "size": 2, "doors": "x"})) == {"doors"}


def test_a_default_that_nobody_registered_is_one_mistake():
    assert set(problems(Shop, {"doors": 3})) == {"main.name", "size"}


def test_nothing_is_built_of_options_with_a_problem():
    value, found = resolve(Street, {"houses": "x"})
    assert value is None and len(found.problems) == 1


def test_whoever_holds_an_impossible_combination_is_not_asked_about_it():
    assert set(problems(House, {"wall": {"height": 1.5}})) == {"wall.height"}


def test_a_component_without_a_dict_is_told_how_to_choose():
    assert "wall.paint.name = 'matt'" in problems(House, {"wall": {"paint": "matt"}})["wall.paint"]


def test_lists_of_components_and_their_indices():
    house, _ = resolve(House, {"wall": {"stripes": [{"name": "matt"}, {"name": "gloss", "layers": 3}]}})
    assert house.wall.stripes == (Matt(), Gloss(layers=3))
    assert set(problems(House, {"wall": {"stripes": [{"name": "matt"}, {"name": "gloss", "layer": 3}]}})) == {
        "wall.stripes.1.layer"
    }


def test_bounds_hold_for_each_element_of_a_list():
    assert set(problems(House, {"wall": {"sizes": [1, 0]}})) == {"wall.sizes"}


def test_the_range_of_a_number_beyond_every_float_is_checked():
    assert set(problems(House, {"wall": {"sizes": [10**400]}, "number": 10**400})) == {"wall.sizes", "number"}
    assert not option(1, "bounded", least=0, most=9).metadata["declared"].allows(10**400)


def test_to_tree_and_back_is_the_identity():
    tree = {"number": 4, "wall": {"paint": {"name": "matt", "grain": "coarse"}, "under": {"name": "gloss"}, "sizes": [3, 2]}}
    house, _ = resolve(House, tree)
    again, found = resolve(House, to_tree(house))
    assert again == house and to_tree(again) == to_tree(house) and not found.filled


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("1e3", int, 1000), ("10_000", int, 10000), ("2.0", int, 2), ("-3", int, -3), ("2", float, 2.0), ("1_0.5", float, 10.5),
        ("none", int | None, None), ("None", str | None, None), ("none", str, "none"), ("true", bool, True), ("0", bool, False),
        ("a b", str, "a b"), ("'1'", str, "1"), ("1,2", tuple[int, ...], (1, 2)), ("[1e3]", tuple[int, ...], (1000,)),
        ("(1, 2)", tuple[int, ...], (1, 2)), (str(2**63 - 1), int, 2**63 - 1),
        ("a,b", tuple[str, ...], ("a", "b")), ("5", tuple[int, ...], (5,)), ("[]", tuple[str, ...], ()),
        ('{"a": [1]}', dict | None, {"a": [1]}), ("[a, b]", tuple[str, ...], ("a", "b")), ("a, b", tuple[str, ...], ("a", "b")),
    ],
)  # fmt: skip
def test_command_line_words_become_typed_values(text, hint, value):
    found = coerce(Text(text), hint)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (Text("1.5"), int), (Text("x"), int), (Text("nan"), float), (Text("maybe"), bool), (True, int), (1, bool), ("3", int),
        (3, str), (None, int), ("ab", tuple[int, ...]), (1.5, int), ([1], dict), (float("nan"), float), (Text("inf"), float),
        (10**400, int), (Text("1" * 400), int), (Text("-" + "1" * 400), int), (Text("1" * 5000), int), (10**400, float),
        (Text("1e400"), int),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(value, hint):
    with pytest.raises(Mismatch):
        coerce(value, hint)


def test_a_name_is_registered_once_and_fields_cannot_hide_it():
    with pytest.raises(ValueError, match="registered by both"):
        register("test.paint", "matt")(Gloss)
    with pytest.raises(ValueError, match="name"):

        @register("test.paint", "odd")
        @options
        class Odd:
            """Hides the registry's name."""

            name: str = option("x", "hidden")

    assert "odd" not in _components["test.paint"]


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("no_such_module:Paint", "there is no module 'no_such_module'"),
        ("strata.no_such_module:Paint", "there is no module 'strata.no_such_module'"),
        ("strata.registry:lookupp", "strata.registry has no 'lookupp'; did you mean 'lookup'"),
        ("strata.registry", "expected 'module:callable'"),
        (":lookup", "expected 'module:callable'"),
        (".registry:lookup", "expected 'module:callable'"),
    ],
)
def test_a_place_with_nothing_in_it_is_told_with_the_part_that_names_it(monkeypatch, place, sentence):
    monkeypatch.setitem(_components, "test.brush", {})
    brush = register("test.brush", "wide", implementation=place)(options(type("Wide", (), {"__doc__": "A brush."})))
    with pytest.raises(
        ConfigError, match=re.escape(f"test.brush 'wide' is registered with implementation = {place!r}; {sentence}")
    ):
        implementation(brush)


def test_a_module_that_lacks_another_one_says_where(monkeypatch, tmp_path):
    monkeypatch.setitem(_components, "test.brush", {})
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_brush.py").write_text("import no_such_module\n")
    brush = register("test.brush", "wide", implementation="a_brush:Wide")(options(type("Wide", (), {"__doc__": "A brush."})))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        implementation(brush)


def test_options_that_do_not_say_what_is_asked_of_their_kind_answer_as_its_base_in_either_order(monkeypatch):
    monkeypatch.setitem(_components, "test.ink", {})
    monkeypatch.setattr("strata.registry._bases", {})

    def ink(name):
        @register("test.ink", name)
        @options
        class Ink:
            """Says one of two things, by a field."""

            dries: bool = option(True, "within a minute")

        return Ink()

    before = ink("before")

    @base("test.ink")
    class Base:
        """What is asked."""

        dries = False
        colour = "black"

        def covers(self, paper):
            """Whether it does."""
            return (self.colour, paper)

    for value in (before, ink("after")):
        assert value.dries and value.colour == "black" and value.covers("white") == ("black", "white")


def test_components_are_found_at_any_depth_in_lists_and_sections():
    @options
    class Inner:
        """A section."""

        coat: object = part("test.paint", "matt", "of the inside")

    @options
    class Outer:
        """Holds parts in every way."""

        inner: Inner = section(Inner, "within")
        coats: tuple = parts("test.paint", "in turn")
        none: object = part("test.paint", None, "absent")

    value = Outer(coats=(Gloss(), Matt()))
    assert dict(components(value, "wall")) == {"wall.inner.coat": Matt(), "wall.coats.0": Gloss(), "wall.coats.1": Matt()}


def test_lookup_suggests_the_nearest_name():
    with pytest.raises(LookupError, match="did you mean gloss"):
        lookup("test.paint", "glos")


def test_a_field_added_later_stays_out_of_the_identity_while_it_has_its_default():
    from strata.resolve import leaves

    @options
    class Later:
        """One old field and one new."""

        old: int = option(1, "was always there")
        new: int = option(2, "came later", added="0.2")

    def identity(value):
        return {path for path, _, _ in leaves(value, identity=True)}

    assert identity(Later()) == {"old"} and identity(Later(new=3)) == {"old", "new"}
    assert {path for path, _, _ in leaves(Later())} == {"old", "new"}
