"""CLINC150, queries to an assistant with 150 intents of ten domains, and queries that have none of them (Larson et al. 2019).

Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction", EMNLP 2019, https://aclanthology.org/D19-1131.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from metarun.config.types import FilePath, Len, PositiveFloat, Seed
from metarun.data.source import Split
from metarun.data.splits import RATIOS, SPLITS, check_ratios, divide
from metarun.data.text import TextSource
from metarun.data.text_archives import check_counts, published_files
from metarun.data.text_files import LabelledText
from metarun.data.text_rows import decoded
from metarun.errors import UserError
from metarun.files import parsed

FILE = "data_full.json"
CHECKSUM = "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0"
ADDRESS = "https://raw.githubusercontent.com/clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data/"
COUNTS = {"train": 15_000, "val": 3_000, "test": 4_500, "oos_train": 100, "oos_val": 100, "oos_test": 1_000}
# The authors' domains.json.
DOMAINS = {
    "auto_and_commute": "current_location directions distance gas gas_type jump_start last_maintenance mpg oil_change_how "
    "oil_change_when schedule_maintenance tire_change tire_pressure traffic uber",
    "banking": "account_blocked balance bill_balance bill_due freeze_account interest_rate min_payment order_checks pay_bill "
    "pin_change report_fraud routing spending_history transactions transfer",
    "credit_cards": "application_status apr card_declined credit_limit credit_limit_change credit_score damaged_card "
    "expiration_date improve_credit_score international_fees new_card redeem_rewards replacement_card_duration "
    "report_lost_card rewards_balance",
    "home": "calendar calendar_update next_song order order_status play_music reminder reminder_update shopping_list "
    "shopping_list_update smart_home todo_list todo_list_update update_playlist what_song",
    "kitchen_and_dining": "accept_reservations calories cancel_reservation confirm_reservation cook_time food_last how_busy "
    "ingredient_substitution ingredients_list meal_suggestion nutrition_info recipe restaurant_reservation "
    "restaurant_reviews restaurant_suggestion",
    "meta": "cancel change_accent change_ai_name change_language change_speed change_user_name change_volume maybe no repeat "
    "reset_settings sync_device user_name whisper_mode yes",
    "small_talk": "are_you_a_bot do_you_have_pets fun_fact goodbye greeting how_old_are_you meaning_of_life tell_joke "
    "thank_you what_are_your_hobbies what_can_i_ask_you what_is_your_name where_are_you_from who_do_you_work_for "
    "who_made_you",
    "travel": "book_flight book_hotel car_rental carry_on exchange_rate flight_status international_visa lost_luggage "
    "plug_type timezone translate travel_alert travel_notification travel_suggestion vaccines",
    "utility": "alarm calculator date definition find_phone flip_coin make_call measurement_conversion roll_dice "
    "share_location spelling text time timer weather",
    "work": "direct_deposit income insurance insurance_change meeting_schedule next_holiday payday pto_balance pto_request "
    "pto_request_status pto_used rollover_401k schedule_meeting taxes w2",
}  # fmt: skip
# Of Zhang et al. 2022, "Fine-tuning Pre-trained Language Models for Few-shot Intent Detection", NAACL, and its code
# (fanolabs/isoIntentBert-main, scripts/transfer_noReg.sh). They leave out the last two, which are BANKING77's subject.
TRAINING = ("auto_and_commute", "home", "meta", "small_talk", "utility", "work")
VALIDATION = ("kitchen_and_dining", "travel")
LEFT_OUT = ("banking", "credit_cards")


class Clinc150(TextSource):
    """CLINC150: 150 intents of ten domains, 150 queries each (100 for training, 20 and 30 for validation and test).

    Episodes draw from all queries of an intent. With `division=domains` the intents are divided by domains as Zhang et al. 2022 do: six
    for training, two (travel, kitchen and dining) for validation; banking and credit cards, which they leave out, are for the
    test. With `division=drawn` all intents are divided by `ratios` and `split_seed`. Ordinary training and testing take the
    official parts.

    `out_of_scope`: with `test.unknown_ways` the queries that no class of a task has are the data set's own out-of-scope queries: 100
    of its validation part for the thresholds, 1,000 of its test part for the test. Raises `UserError` for a file that is missing or is
    another one.

    Args:
        root: The folder with data_full.json; null is <METARUN_DATA>/text/clinc150, or <METARUN_DATA>/clinc150.
        download: Whether the file is downloaded if it is not there.
        division: By what the intents are divided into those of training, validation and test.
        ratios: The shares of train, val and test classes of a drawn division, which sum to 1; null is [0.64, 0.16, 0.2].
        split_seed: The seed of a drawn division.
        out_of_scope: Whether queries of unknown classes are the data set's out-of-scope queries.
    """

    as_target = "target=clinc150"

    def __init__(
        self,
        *,
        root: FilePath | None = None,
        download: bool = True,
        division: Literal["domains", "drawn"] = "domains",
        ratios: Annotated[list[PositiveFloat], Len(3, 3)] | None = None,
        split_seed: Seed = 0,
        out_of_scope: bool = False,
    ) -> None:
        rows, unknown = read_clinc150(root, download)
        names = sorted({row.label for row in rows})
        divided: dict[Split, list[str]]
        if division == "domains":
            if ratios is not None:
                raise UserError("data.ratios: are of a drawn division; add data.division=drawn, or leave them out")
            divided = {
                "train": intents(TRAINING),
                "val": intents(VALIDATION),
                "test": intents(LEFT_OUT),
            }
        else:
            shares = check_ratios(ratios, RATIOS)
            drawn = divide(names, (None, None, None), shares, split_seed, key="data clinc150", where="it")
            divided = {split: [names[number] for number in drawn[split]] for split in SPLITS}
        super().__init__(
            rows,
            dict(divided),
            ordinary=True,
            key="data clinc150",
            metadata={"division": division},
            unknown=unknown if out_of_scope else None,
        )


def intents(domains: tuple[str, ...]) -> list[str]:
    """The intents of domains, sorted."""
    return sorted(intent for domain in domains for intent in DOMAINS[domain].split())


def read_clinc150(root: str | None, may_download: bool) -> tuple[list[LabelledText], dict[Split, list[str]]]:
    """The queries with their intents and domains, sorted by intent; and the out-of-scope queries of each part.

    Raises:
        UserError: The file is missing, or is another one.
    """
    (path,) = published_files("clinc150", root, {FILE: CHECKSUM}, ADDRESS, may_download=may_download).values()
    try:
        content: Any = parsed(decoded(path, "data clinc150", None))
        parts = {name: [(str(text), str(label)) for text, label in content[name]] for name in COUNTS}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"data clinc150: {path} is not the published file ({error})") from error
    for name, count in COUNTS.items():
        check_counts("clinc150", path, f"queries in {name}", len(parts[name]), count)
    domain = {intent: name for name, own in DOMAINS.items() for intent in own.split()}
    found = Counter(label for part in SPLITS for _, label in parts[part])
    if strange := sorted(found.keys() ^ domain.keys()):
        raise UserError(f"data clinc150: {path} is not the published file; the intent {strange[0]} differs")
    rows = [
        LabelledText(text.strip(), label, part, domain[label], f"{FILE}, {part} {number}")
        for part in SPLITS
        for number, (text, label) in enumerate(parts[part])
    ]
    unknown: dict[Split, list[str]] = {
        part: [text.strip() for text, _ in parts[f"oos_{part}"]] for part in SPLITS if part != "train"
    }
    return sorted(rows, key=lambda row: row.label), unknown
