"""MovieLens: a task a user, whose ratings are predicted from a few of them (Harper and Konstan 2015).

The split is that of MeLU (Lee et al. 2019, https://arxiv.org/abs/1908.00413, section 4): users and films are divided both, so that
a test can be of new users, of new films, or of new users on new films.

    a task: shots + queries ratings of one user; x = (film, user), y = the rating
    MAE = mean |prediction - rating|,  nDCG@k of the queries ranked by prediction, gain 2^rating - 1    (section 4.2)

Differences from MeLU and its code (hoyeoplee/MeLU):
- The data are those with 100,000 ratings, whose files say of a film its genres and its year, and of a user age, gender and
  occupation. MeLU has a million ratings, and of a film its director and actors too.
- Films and users are divided at random; there by the films' years and the users' first ratings.
- Every task has `task.shots` ratings to learn from and `task.queries` to predict. There 10 are predicted from all others of users with
  13 to 100 ratings, which is `task.shots=[3,90]` here, but for users with more.
- x is vectors of numbers; there each part has an embedding that is learned.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarun.config.types import FilePath, Len, PositiveFloat, Seed
from metarun.core import Episodes, TaskShape, count_text, largest, least, together
from metarun.data.archives import BROKEN_ARCHIVE, content_of
from metarun.data.image_batches import allot, generator
from metarun.data.roots import data_root
from metarun.data.sampler import distinct, uniforms
from metarun.data.source import PURPOSE, DataSource, EpisodeSampler, Split, refuse_classes
from metarun.data.splits import SPLITS, check_ratios
from metarun.errors import UserError
from metarun.files import typed_path
from metarun.ops.metrics import ndcg
from metarun.text import counted, shown_path

GENRES = 19  # flags of a film in u.item
FILES = {"u.data": ("\t", 4), "u.item": ("|", 5 + GENRES), "u.user": ("|", 5)}  # separators, and fields of a line
BETWEEN = {"\t": "tabs", "|": "bars"}
DIGITS = 18  # of a number at most
LARGEST = 2**27  # bytes of a file in an archive; the published ones have 2 MB at most
RATIOS = (0.7, 0.1, 0.2)  # of users, and of films, for training, validation and testing
LEAST, MOST = 1, 5  # of a rating
OLDEST = 120  # years of a user
YEARS = 1870, 2100  # from which and to which a film may be
GENDERS = ("M", "F")
ADDRESS = "https://grouplens.org/datasets/movielens/100k/"


class MovieLens(DataSource):
    """Ratings of films, a task a user; what is predicted is the rating less the mean of the training ratings.

    The files u.data, u.item and u.user are looked for in `root`, or in an archive there; nothing is downloaded. An item is
    the genres and the year of a film and the age, gender and occupation of the user, float `[D]`.

    Args:
        root: The folder with u.data, u.item and u.user, or the archive ml-100k.zip; null is <METARUN_DATA>/ml-100k.
        cold: What a test has of its own: its users, its films (items), or both. The other is that of training.
        ratios: The shares of training, validation and test of the users, and of the films, which sum to 1; null is [0.7, 0.1, 0.2].
        split_seed: The seed of the division, which is not the run's.
    """

    kind = "regression"
    item = "vector"
    outputs = 1

    def __init__(
        self,
        *,
        root: FilePath | None = None,
        cold: Literal["users", "items", "both"] = "users",
        ratios: Annotated[list[PositiveFloat], Len(3, 3)] | None = None,
        split_seed: Seed = 0,
    ) -> None:
        folder = typed_path(root).absolute() if root else data_root() / "ml-100k"
        self.cold = cold
        digest = hashlib.sha256()
        lines = {name: _lines(folder, name, digest) for name in FILES}
        users, films = _users(lines["u.user"]), _films(lines["u.item"])
        shares = np.array(check_ratios(ratios, RATIOS))
        self.users, self.films = (
            _divided(sorted(known), shares, f"{what}/{split_seed}")
            for what, known in (("users", users), ("items", films))
        )
        self._vectors = films, users
        self.input_shape = (len(next(iter(films.values()))) + len(next(iter(users.values()))),)
        ratings = _ratings(lines["u.data"], users, films)
        # Of each split the users, and of each of them the films that count and their ratings.
        own = {split: {user: np.array(rated) for user, rated in ratings.items()} for split in SPLITS}
        self.tasks = {split: self._tasks(own[split], split) for split in SPLITS}
        known = np.concatenate([rated[:, 1] for _, rated in self.tasks["train"]] or [np.zeros(1)])
        self.mean = float(known.mean())
        depends = repr((digest.hexdigest(), cold, shares.tolist(), split_seed))
        self._fingerprint = hashlib.sha256(depends.encode()).hexdigest()

    def _tasks(self, ratings: dict[int, np.ndarray], split: Split) -> list[tuple[int, np.ndarray]]:
        """The users of a split with their ratings `[n, 2]` of the split's films: the film, and the rating."""
        of_users, of_films = self._home(split)
        found = []
        for user in self.users[of_users]:
            rated = ratings.get(user, np.zeros((0, 2), int))
            found.append((user, rated[np.isin(rated[:, 0], self.films[of_films])]))
        return [(user, rated) for user, rated in found if len(rated)]

    def _home(self, split: Split) -> tuple[Split, Split]:
        """The split that the users of a split's tasks are of, and that of their films: training where `cold` does not name them."""
        return split if self.cold != "items" else "train", split if self.cold != "users" else "train"

    def sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        key = "train.task" if split == "train" else "test.task"
        refuse_classes(task, "a task of ratings")
        if isinstance(task.queries, tuple):
            raise UserError(
                f"{key}.queries={count_text(task.queries)}: a task of ratings has a fixed number of queries; give one number"
            )
        needed = least(task.shots) + task.queries
        able = [(user, rated) for user, rated in self.tasks[split] if len(rated) >= needed]
        if not able:
            most = max((len(rated) for _, rated in self.tasks[split]), default=0)
            who, what = (PURPOSE[one] for one in self._home(split))
            raise UserError(
                f"task: shots + queries = {least(task.shots)} + {task.queries} = {needed} is above the {most} ratings that any user "
                f"of {who} has of films of {what} (data.cold={self.cold}); lower {key}.shots or {key}.queries"
            )
        films, users = self._vectors
        # With a range of shots a user's support set is all ratings but the queries, as far as the range allows.
        sizes = [min(largest(task.shots), len(rated) - least(task.queries)) for _, rated in able]

        def episode(number: int) -> Episodes:
            who = int(uniforms(seed, split, number, number + 1, 1)[0, 0] * len(able))
            (user, rated), count = able[who], sizes[who] + least(task.queries)
            draws = uniforms(seed, f"{split}/ratings", number, number + 1, 2 * count)
            rows = rated[distinct(draws[:, :count], draws[:, count:], np.array([len(rated)]))[0]]
            x = np.stack([np.concatenate([films[int(film)], users[user]]) for film in rows[:, 0]])
            y = (rows[:, 1:] - self.mean).astype(np.float32)
            (support_x, query_x), (support_y, query_y) = (
                torch.from_numpy(part[None]).to(device).split([sizes[who], count - sizes[who]], dim=1)
                for part in (x, y)
            )
            return Episodes(support_x, support_y, query_x, query_y, ways=1)

        return lambda start, stop: together([episode(number) for number in range(start, stop)])

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Measures the mean absolute error, of predictions cut to the scale of ratings, and nDCG@5, `[T]` each."""
        rating = (target + self.mean)[..., 0].round()
        guess = (prediction + self.mean)[..., 0]
        return {
            "mae": (guess.clamp(LEAST, MOST) - rating).abs().mean(-1),
            "ndcg5": ndcg(guess, rating, 5),
        }

    def tasks_of(self, split: Split) -> str:
        users, films = (PURPOSE[one] for one in self._home(split))
        return f"ratings by users of {users} of films of {films}"

    def describe(self) -> dict[str, Any]:
        return {
            "fingerprint": self._fingerprint,
            "input_shape": list(self.input_shape),
            "cold": self.cold,
            "users": {split: len(self.tasks[split]) for split in SPLITS},
            "ratings": {split: sum(len(rated) for _, rated in self.tasks[split]) for split in SPLITS},
            "mean_rating": self.mean,
        }


def _divided(known: list[int], shares: np.ndarray, key: str) -> dict[Split, list[int]]:
    """Users or films divided at random by their shares."""
    order = generator("movielens", key).permutation(len(known))
    stops = np.cumsum(allot(len(known), shares))
    starts = [0, *stops[:-1]]
    return {
        split: sorted(known[place] for place in order[start:stop])
        for split, start, stop in zip(SPLITS, starts, stops, strict=True)
    }


class Line(NamedTuple):
    """A line of a file."""

    file: str
    number: int
    fields: list[str]

    @property
    def where(self) -> str:
        """What errors begin with."""
        return f"{self.file}, line {self.number}"


def _lines(root: Path, name: str, digest: Any) -> list[Line]:
    """The lines of a file with their fields; the digest takes its bytes."""
    content, where = _content(root, name)
    digest.update(content)
    separator, count = FILES[name]
    found: list[Line] = []
    # Not splitlines: of Latin-1 that takes some bytes within a title for the end of a line.
    for number, line in enumerate(content.decode("latin-1").split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split(separator)
        if len(fields) != count:
            raise UserError(
                f"data.root: {where}, line {number}: has {counted(len(fields), 'field')} and not {count}, apart by {BETWEEN[separator]}"
            )
        found.append(Line(f"data.root: {where}", number, fields))
    if not found:
        raise UserError(f"data.root: {where} is empty")
    return found


def _content(root: Path, name: str) -> tuple[bytes, str]:
    """The bytes of a file of the data set, in a folder or in an archive."""
    archive = root if root.suffix == ".zip" else root / "ml-100k.zip"
    for path in (root / name, root / "ml-100k" / name):
        if path.is_file():
            try:
                return path.read_bytes(), shown_path(path)
            except OSError as error:
                raise UserError(f"data.root: {shown_path(path)}: cannot be read ({error.strerror})") from error
    if archive.is_file():
        try:
            with zipfile.ZipFile(archive) as opened:
                for member in opened.namelist():
                    if member.rpartition("/")[2] == name:
                        return content_of(opened, member, LARGEST), f"{shown_path(archive)}, {name}"
        except (OSError, *BROKEN_ARCHIVE) as error:
            raise UserError(f"data.root: {shown_path(archive)}: cannot be read ({error})") from error
    raise UserError(
        f"data.root: there is no {name} in {shown_path(root)}; get ml-100k.zip from {ADDRESS} and name its folder with data.root="
    )


def _number(text: str, where: str, what: str) -> int:
    digits = text.strip().removeprefix("-")
    if not (digits.isascii() and digits.isdecimal()):  # int() takes 1_0 for 10
        raise UserError(f"{where}: the {what} {text!r} is no whole number")
    if len(digits) > DIGITS:
        raise UserError(f"{where}: the {what} has {len(digits)} digits, more than any number here")
    return int(text)


def _once(lines: Sequence[Line], keys: Sequence[Hashable], what: Callable[[Line], str]) -> None:
    """Checks that no two lines are about the same, as in a file that was written twice; raises `UserError` that names both."""
    first: dict[Hashable, int] = {}
    for line, key in zip(lines, keys, strict=True):
        if first.setdefault(key, line.number) != line.number:
            raise UserError(f"{line.where}: {what(line)} is in line {first[key]} already")


def _users(lines: Sequence[Line]) -> dict[int, np.ndarray]:
    """The vector of each user: age, gender and occupation."""
    numbers = [_number(line.fields[0], line.where, "user") for line in lines]
    _once(lines, numbers, lambda line: f"user {line.fields[0]}")
    occupations = sorted({line.fields[3] for line in lines})
    found = {}
    for line, number in zip(lines, numbers, strict=True):
        _, years, gender, occupation, _ = line.fields
        age = _number(years, line.where, "age")
        if not 0 < age <= OLDEST:
            raise UserError(f"{line.where}: the age {age} is not from 1 to {OLDEST}")
        if gender not in GENDERS:
            raise UserError(f"{line.where}: the gender {gender!r} is not {' or '.join(GENDERS)}")
        one_hot = [float(occupation == one) for one in occupations]
        found[number] = np.array([(age - 35) / 15, float(gender == "F"), *one_hot], np.float32)
    return found


def _films(lines: Sequence[Line]) -> dict[int, np.ndarray]:
    """The vector of each film: its year in decades from 1990, and a flag for each genre."""
    numbers = [_number(line.fields[0], line.where, "film") for line in lines]
    _once(lines, numbers, lambda line: f"film {line.fields[0]}")
    found = {}
    for line, number in zip(lines, numbers, strict=True):
        flags = np.array([_number(flag, line.where, "genre") for flag in line.fields[5:]], np.float32)
        if not set(flags.tolist()) <= {0.0, 1.0}:
            raise UserError(f"{line.where}: the genres must be {GENRES} flags of 0 and 1")
        year = line.fields[2].rpartition("-")[2]
        if year.isdecimal() and not YEARS[0] <= _number(year, line.where, "year") <= YEARS[1]:
            raise UserError(f"{line.where}: the year {year} is not from {YEARS[0]} to {YEARS[1]}")
        decades = (int(year) - 1990) / 10 if year.isdecimal() else 0.0
        found[number] = np.concatenate([[decades], flags]).astype(np.float32)
    return found


def _ratings(
    lines: Sequence[Line], users: dict[int, np.ndarray], films: dict[int, np.ndarray]
) -> dict[int, list[tuple[int, int]]]:
    """For each user the films that they rated and the ratings, in the order of the files."""
    found: dict[int, list[tuple[int, int]]] = {}
    pairs = []
    for line in lines:
        user, film, rating = (
            _number(text, line.where, what) for text, what in zip(line.fields, ("user", "film", "rating"), strict=False)
        )
        if user not in users:
            raise UserError(f"{line.where}: there is no user {user} in u.user")
        if film not in films:
            raise UserError(f"{line.where}: there is no film {film} in u.item")
        if not LEAST <= rating <= MOST:
            raise UserError(f"{line.where}: the rating {rating} is not from {LEAST} to {MOST}")
        found.setdefault(user, []).append((film, rating))
        pairs.append((user, film))
    _once(lines, pairs, lambda line: f"a rating of film {line.fields[1]} by user {line.fields[0]}")
    return found
