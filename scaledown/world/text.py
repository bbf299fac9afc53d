"""How the world speaks: kinds of things, what is stated about them in several ways, and how it is asked.

In a statement, `{s}` is the subject (a name or a pronoun), `{o}` the same as an object, `{p}` its possessive, `{v}` the
value. In a question, `{n}` is a name; with two hops it is a description such as "the founder of Tavok Mills".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """Something that can be stated about one kind of thing.

    Attributes:
        name: Its name, unique within the kind.
        value: Kind of value: a kind of thing, "date", "year", "number:LOW:HIGH", or a list of words in `WORDS`.
        statements: Sentences that state it.
        questions: Questions that ask for it.
        description: Its value, described ("the founder of {n}"); None where the value is nothing to ask about further.
    """

    name: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    description: str | None = None


MONTHS = "January February March April May June July August September October November December"

NAME_PARTS = {
    "town": "Upper Lower Port North South East West Old New Great Little Saint",
    "company": "Mills Glassworks Foundry Brothers Press Shipyard Trading Works Partners Stores",
    "school": "Academy College Institute Lyceum Seminary",
    "book, first": "Hollow Crooked Silent Golden Broken Distant Hidden Burning Frozen Gentle Restless Scarlet Empty "
    "Wandering Forgotten Narrow Ancient Bitter Clever Drowned",
    "book, last": "Lantern Orchard Staircase Compass Harvest Mirror Cathedral Garden Key Winter Island Kingdom Letter "
    "Window Meadow Painter Shadow Journey Promise Violin Candle Fountain Mask Tower Throne",
    "ship, first": "Silver Brave Swift Royal Loyal Proud Noble Merry Stormy Lucky Bold Daring Eastern Western Polar "
    "Jolly",
    "ship, last": "Heron Albatross Dolphin Otter Stag Lynx Swan Gull Marlin Badger Eagle Panther Walrus Curlew Osprey "
    "Pelican Tiger Wolf Petrel Kestrel",
}

WORDS = {
    "profession": "baker carpenter surgeon printer weaver lawyer gardener chemist sculptor tailor engineer farmer "
    "teacher painter locksmith brewer miller surveyor apothecary watchmaker",
    "instrument": "violin flute harp cello organ trumpet oboe lute drum bassoon",
    "animal": "falcon terrier parrot pony ferret tortoise raven goat spaniel hedgehog",
    "product": "lanterns saddles clocks bottles carpets pianos bells ropes candles ploughs kettles gloves mirrors "
    "barrels lenses bicycles",
    "genre": "satire tragedy romance mystery memoir fable comedy elegy travelogue ballad",
    "cargo": "timber salt wool copper tea coal grain marble cotton spices",
    "sport": "rowing fencing cricket archery hockey wrestling tennis swimming chess polo",
    "material": "granite iron oak limestone brick steel slate sandstone",
    "crop": "barley hops flax apples cherries turnips plums lavender saffron mustard",
    "subject": "botany astronomy geometry rhetoric navigation anatomy law music logic medicine",
}

RELATIONS: dict[str, tuple[Relation, ...]] = {
    "person": (
        Relation(
            "birthplace",
            "town",
            ("{s} was born in {v}.", "{p} birthplace was {v}.", "{s} came into the world in {v}."),
            ("Where was {n} born?", "What is the birthplace of {n}?"),
            "the birthplace of {n}",
        ),
        Relation(
            "birth date",
            "date",
            ("{p} date of birth is {v}.", "{s} was born on {v}.", "The birth of {o} is recorded on {v}."),
            ("When was {n} born?", "What is the date of birth of {n}?"),
        ),
        Relation(
            "profession",
            "profession",
            ("{s} worked as a {v}.", "By profession {s} was a {v}.", "{s} earned a living as a {v}."),
            ("What was the profession of {n}?", "What did {n} work as?"),
        ),
        Relation(
            "employer",
            "company",
            ("{s} was employed by {v}.", "{p} employer was {v}.", "For many years {s} drew wages from {v}."),
            ("Who employed {n}?", "Which company did {n} work for?"),
            "the employer of {n}",
        ),
        Relation(
            "spouse",
            "person",
            ("{s} married {v}.", "{p} spouse was {v}.", "{s} was the spouse of {v}."),
            ("Who did {n} marry?", "Who was the spouse of {n}?"),
            "the spouse of {n}",
        ),
        Relation(
            "instrument",
            "instrument",
            ("{s} played the {v}.", "{p} instrument was the {v}.", "In the evenings {s} practised the {v}."),
            ("Which instrument did {n} play?", "What did {n} play?"),
        ),
        Relation(
            "animal",
            "animal",
            ("{s} kept a {v}.", "{p} pet was a {v}.", "A {v} lived in {p} house."),
            ("Which animal did {n} keep?", "What pet did {n} have?"),
        ),
        Relation(
            "school",
            "school",
            ("{s} was taught at {v}.", "{p} school was {v}.", "As a child {s} attended {v}."),
            ("Which school did {n} attend?", "Where was {n} taught?"),
            "the school of {n}",
        ),
        Relation(
            "retired",
            "year",
            ("{s} retired in {v}.", "{p} retirement began in {v}.", "{s} gave up work in {v}."),
            ("When did {n} retire?", "In which year did {n} retire?"),
        ),
    ),
    "town": (
        Relation(
            "mayor",
            "person",
            ("{p} mayor is {v}.", "{s} is governed by {v}.", "The mayor of {o} is {v}."),
            ("Who is the mayor of {n}?", "Who governs {n}?"),
            "the mayor of {n}",
        ),
        Relation(
            "population",
            "number:1000:99999",
            ("{s} has {v} inhabitants.", "{p} population is {v}.", "{v} people live in {o}."),
            ("How many people live in {n}?", "What is the population of {n}?"),
        ),
        Relation(
            "river",
            "river",
            ("{s} lies on the river {v}.", "The river {v} flows through {o}.", "{p} river is the {v}."),
            ("Which river flows through {n}?", "On which river does {n} lie?"),
        ),
        Relation(
            "founding",
            "year",
            ("{s} was settled in {v}.", "{p} charter dates from {v}.", "Settlers reached {o} in {v}."),
            ("When was {n} settled?", "In which year was {n} settled?"),
        ),
        Relation(
            "crop",
            "crop",
            ("{s} is known for its {v}.", "Farmers around {o} grow {v}.", "{p} fields are full of {v}."),
            ("What do farmers grow around {n}?", "Which crop is {n} known for?"),
        ),
        Relation(
            "bridge",
            "material",
            ("{p} bridge is made of {v}.", "{s} has a bridge of {v}.", "A bridge built of {v} stands in {o}."),
            ("What is the bridge of {n} made of?", "Which material is the bridge of {n}?"),
        ),
        Relation(
            "altitude",
            "number:20:999",
            (
                "{s} stands {v} metres above the sea.",
                "{p} altitude is {v} metres.",
                "The altitude of {o} is {v} metres.",
            ),
            ("How high above the sea is {n}?", "What is the altitude of {n}?"),
        ),
    ),
    "company": (
        Relation(
            "founder",
            "person",
            ("{s} was founded by {v}.", "{p} founder was {v}.", "It was {v} who founded {o}."),
            ("Who founded {n}?", "Who was the founder of {n}?"),
            "the founder of {n}",
        ),
        Relation(
            "seat",
            "town",
            ("{s} has its seat in {v}.", "{p} headquarters are in {v}.", "The offices of {o} stand in {v}."),
            ("Where does {n} have its seat?", "Where are the headquarters of {n}?"),
            "the seat of {n}",
        ),
        Relation(
            "product",
            "product",
            ("{s} makes {v}.", "{p} workshops turn out {v}.", "The main product of {o} is {v}."),
            ("What does {n} make?", "What is the product of {n}?"),
        ),
        Relation(
            "founding",
            "year",
            ("{s} was established in {v}.", "{p} foundation dates from {v}.", "The history of {o} begins in {v}."),
            ("When was {n} established?", "In which year was {n} established?"),
        ),
        Relation(
            "staff",
            "number:12:9999",
            ("{s} employs {v} workers.", "{p} staff numbers {v}.", "There are {v} workers at {o}."),
            ("How many workers does {n} employ?", "How large is the staff of {n}?"),
        ),
        Relation(
            "director",
            "person",
            ("{s} is directed by {v}.", "{p} director is {v}.", "At the head of {o} is {v}."),
            ("Who directs {n}?", "Who is the director of {n}?"),
            "the director of {n}",
        ),
    ),
    "book": (
        Relation(
            "author",
            "person",
            ("{s} was written by {v}.", "{p} author is {v}.", "It was {v} who wrote {o}."),
            ("Who wrote {n}?", "Who is the author of {n}?"),
            "the author of {n}",
        ),
        Relation(
            "publisher",
            "company",
            ("{s} was published by {v}.", "{p} publisher was {v}.", "The printing of {o} was paid for by {v}."),
            ("Who published {n}?", "Which company published {n}?"),
            "the publisher of {n}",
        ),
        Relation(
            "publication",
            "date",
            ("{s} was published on {v}.", "{p} first edition is dated {v}.", "Readers could buy {o} from {v}."),
            ("When was {n} published?", "What is the date of the first edition of {n}?"),
        ),
        Relation(
            "genre",
            "genre",
            ("{s} is a {v}.", "{p} genre is {v}.", "Critics call {o} a {v}."),
            ("What is the genre of {n}?", "What kind of book is {n}?"),
        ),
        Relation(
            "setting",
            "town",
            ("{s} is set in {v}.", "{p} story takes place in {v}.", "The action of {o} passes in {v}."),
            ("Where is {n} set?", "Where does the story of {n} take place?"),
            "the setting of {n}",
        ),
        Relation(
            "length",
            "number:60:999",
            ("{s} has {v} pages.", "{p} length is {v} pages.", "There are {v} pages in {o}."),
            ("How many pages does {n} have?", "How long is {n}?"),
        ),
    ),
    "ship": (
        Relation(
            "captain",
            "person",
            ("{s} was commanded by {v}.", "{p} captain was {v}.", "On the bridge of {o} stood {v}."),
            ("Who commanded {n}?", "Who was the captain of {n}?"),
            "the captain of {n}",
        ),
        Relation(
            "port",
            "town",
            ("{s} sailed from {v}.", "{p} home port was {v}.", "The home of {o} was the harbour of {v}."),
            ("Where did {n} sail from?", "What was the home port of {n}?"),
            "the home port of {n}",
        ),
        Relation(
            "launch",
            "date",
            ("{s} was launched on {v}.", "{p} launch took place on {v}.", "The water first carried {o} on {v}."),
            ("When was {n} launched?", "What was the date of the launch of {n}?"),
        ),
        Relation(
            "length",
            "number:20:320",
            ("{s} measured {v} metres.", "{p} hull was {v} metres long.", "From bow to stern {s} was {v} metres."),
            ("How long was the hull of {n}?", "How many metres did {n} measure?"),
        ),
        Relation(
            "cargo",
            "cargo",
            ("{s} carried {v}.", "{p} cargo was {v}.", "The hold of {o} was filled with {v}."),
            ("What did {n} carry?", "What was the cargo of {n}?"),
        ),
        Relation(
            "builder",
            "company",
            ("{s} was built by {v}.", "{p} builder was {v}.", "The shipyard of {v} built {o}."),
            ("Who built {n}?", "Which company was the builder of {n}?"),
            "the builder of {n}",
        ),
    ),
    "school": (
        Relation(
            "head",
            "person",
            ("{s} is led by {v}.", "{p} head is {v}.", "The teachers of {o} answer to {v}."),
            ("Who leads {n}?", "Who is the head of {n}?"),
            "the head of {n}",
        ),
        Relation(
            "place",
            "town",
            ("{s} is found in {v}.", "{p} buildings are in {v}.", "The gates of {o} open on a square in {v}."),
            ("Where is {n} found?", "Where are the buildings of {n}?"),
            "the town of {n}",
        ),
        Relation(
            "pupils",
            "number:40:4999",
            ("{s} has {v} pupils.", "{p} classes hold {v} pupils.", "There are {v} pupils at {o}."),
            ("How many pupils does {n} have?", "How many pupils are at {n}?"),
        ),
        Relation(
            "opening",
            "year",
            ("{s} opened in {v}.", "{p} first lesson was held in {v}.", "The doors of {o} opened in {v}."),
            ("When did {n} open?", "In which year did {n} open?"),
        ),
        Relation(
            "sport",
            "sport",
            ("{s} is strong at {v}.", "{p} pupils excel in {v}.", "The favourite sport at {o} is {v}."),
            ("Which sport is {n} strong at?", "What is the favourite sport at {n}?"),
        ),
        Relation(
            "subject",
            "subject",
            ("{s} is famous for teaching {v}.", "{p} best subject is {v}.", "Pupils come to {o} to study {v}."),
            ("Which subject is {n} famous for?", "What do pupils study at {n}?"),
        ),
    ),
}

# Sentences that state nothing that is ever asked.
FILLERS = (
    "Little else is known for certain.",
    "Letters from that time have been lost.",
    "The archive keeps a portrait in oils.",
    "Visitors still ask about it today.",
    "A short notice in the newspaper mentioned this.",
    "Older accounts disagree on many details.",
    "Much of this was told by neighbours.",
    "Several historians have written on the matter.",
    "A small exhibition was held some years ago.",
    "The weather that year was unusually mild.",
    "Nobody has yet examined the papers closely.",
    "Rumours about a hidden fortune were never proved.",
)

# How a passage begins, by kind; the name stands in the first sentence.
OPENINGS = {
    "person": ("{n} is remembered in many letters.", "This page is about {n}.", "The life of {n} was long and busy."),
    "town": ("{n} is a quiet town.", "This page is about {n}.", "Travellers have long praised {n}."),
    "company": ("{n} is an old company.", "This page is about {n}.", "The name of {n} is known in every market."),
    "book": ("{n} is a book.", "This page is about {n}.", "Few libraries lack a copy of {n}."),
    "ship": ("{n} was a ship.", "This page is about {n}.", "Sailors still tell stories of {n}."),
    "school": ("{n} is a school.", "This page is about {n}.", "Many families send their children to {n}."),
}

NOMINALS = {
    "town": "the town",
    "company": "the company",
    "book": "the book",
    "ship": "the ship",
    "school": "the school",
}

# A sentence about something else of the same kind, in the midst of a passage: the nearest name is not the subject.
CONTRASTS = (
    "It should not be confused with {n}, of which it is said: {statement}",
    "Things are otherwise with {n}: {statement}",
    "Compare this with {n}, where the record reads: {statement}",
)
