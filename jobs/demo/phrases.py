"""The words of the demo minutes: subjects of facts, their statements, the grammar of the talk.

It knows English phrases and nothing else: no randomness, no documents, no files; `minutes.py` puts the
phrases together. A rule's text names other rules in braces; names that are missing here (`person`, `amount`,
`code`, ...) are values that `minutes.py` draws.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of fact: which subjects it is asked of, the question, and the ways in which minutes state it.

    In every statement the subject `{s}` stands before the value `{v}`.
    """

    subjects: str
    value: str
    question: str
    statements: tuple[str, ...]


SUBJECTS: dict[str, tuple[str, ...]] = {
    "project": (
        "supplier review", "staff training", "website rebuild", "roof repair", "heating upgrade",
        "stock count",
        "summer programme", "safety audit", "ticket system", "volunteer rota", "car park survey",
        "kitchen refit",
        "membership drive", "lighting plan", "newsletter redesign", "grant application",
        "storage clearance",
        "pilot scheme", "recycling trial", "accessibility study", "window replacement", "lift inspection",
        "garden project", "oral history project", "van replacement", "payroll change", "visitor survey",
        "mentoring scheme", "signage project", "archive transfer", "booking trial", "noise study",
    ),
    "door": (
        "archive room", "server room", "north gate", "medicine cabinet", "tool shed", "loading bay",
        "boat house",
        "music room", "cash office", "print room", "cold store", "bicycle shelter", "key cupboard",
        "plant room",
        "film store", "side entrance",
    ),
    "paper": (
        "insurance policy", "cleaning contract", "lease agreement", "fuel order", "energy contract",
        "loan agreement", "maintenance contract", "catering order", "security contract", "waste permit",
        "music licence", "building permit", "planning file", "hire agreement", "water survey",
        "printing order",
    ),
    "event": (
        "annual dinner", "open day", "spring fair", "board retreat", "press briefing", "volunteers' lunch",
        "harvest supper", "staff forum", "book sale", "charity auction", "careers evening",
        "winter concert",
        "planning workshop", "science evening", "welcome morning", "donors' evening",
    ),
    "item": (
        "folding chairs", "display panels", "safety helmets", "lanterns", "desk lamps", "storage boxes",
        "tablets",
        "headsets", "notebooks", "shelving units", "water filters", "name badges", "fire blankets",
        "extension leads", "bicycle racks", "flower tubs",
    ),
    "desk": (
        "help desk", "reception", "night porter", "accounts office", "workshop", "loading dock",
        "press office",
        "nursery", "repair counter", "ticket office", "first aid post", "front lodge", "staff canteen",
        "lost property office", "mail room", "transport desk",
    ),
}  # fmt: skip

KINDS: dict[str, Kind] = {
    "owner": Kind("project", "outsider", "Who owns the {s}?", (
        "the {s} is owned by {v}", "the owner of the {s} is {v}", "the {s} now has {v} as its owner",
        "ownership of the {s} went to {v}", "as for the {s}, its owner will be {v}")),
    "start": Kind("project", "date", "When does the {s} start?", (
        "the {s} starts on {v}", "the {s} will start on {v}", "the start of the {s} is set for {v}",
        "work on the {s} begins on {v}", "the first day of the {s} will be {v}")),
    "budget": Kind("project", "amount", "How much was approved for the {s}?", (
        "for the {s} a sum of {v} was approved", "the budget approved for the {s} is {v}",
        "the {s} was given {v}", "spending on the {s} was approved at {v}",
        "the {s} may cost {v} and not a cent more")),
    "company": Kind("project", "company", "Which company was chosen for the {s}?", (
        "the contract for the {s} goes to {v}", "the {s} will be carried out by {v}",
        "the company chosen for the {s} is {v}", "for the {s} the choice fell on {v}",
        "of all the bids for the {s} the best came from {v}")),
    "code": Kind("door", "code", "What is the access code of the {s}?", (
        "the access code of the {s} is {v}", "the {s} can be opened with code {v}",
        "the new code for the {s} is {v}", "the lock of the {s} has been set to {v}",
        "whoever needs the {s} should enter {v}")),
    "reference": Kind("paper", "reference", "What is the reference of the {s}?", (
        "the reference of the {s} is {v}", "the {s} is filed under {v}",
        "the {s} carries the reference {v}",
        "letters about the {s} should quote {v}", "the {s} has been entered in the register as {v}")),
    "deadline": Kind("paper", "date", "By when must the {s} be signed?", (
        "the {s} must be signed by {v}", "the last day for signing the {s} is {v}",
        "signatures on the {s} are due by {v}", "the {s} has to be signed no later than {v}",
        "the time for signing the {s} runs out on {v}")),
    "venue": Kind("event", "venue", "Where will the {s} be held?", (
        "the {s} will be held at {v}", "the venue of the {s} is {v}", "the {s} takes place at {v}",
        "for the {s} the secretary has booked {v}", "guests of the {s} will be received at {v}")),
    "day": Kind("event", "date", "On what date is the {s}?", (
        "the {s} is on {v}", "the date of the {s} is {v}", "the {s} has been fixed for {v}",
        "the day chosen for the {s} is {v}", "the invitations to the {s} say {v}")),
    "opener": Kind("event", "outsider", "Who will open the {s}?", (
        "the {s} will be opened by {v}", "the opening words at the {s} will come from {v}",
        "the guest who opens the {s} is {v}", "the honour of opening the {s} falls to {v}",
        "the {s} will begin with a welcome by {v}")),
    "quantity": Kind("item", "quantity", "How many {s} were ordered?", (
        "the number of {s} ordered is {v}", "the order for {s} was placed at {v}",
        "the {s} on order now number {v}", "as to {s}, the order came to {v}",
        "the storekeeper's order for {s} stands at {v}")),
    "extension": Kind("desk", "extension", "What is the extension of the {s}?", (
        "the extension of the {s} is {v}", "the {s} can be reached on extension {v}",
        "calls for the {s} go to extension {v}", "the telephone of the {s} has extension {v}",
        "the {s} moved to extension {v}")),
}  # fmt: skip

LEADS: tuple[str, ...] = (
    "", "", "", "For the record, ", "After some discussion, it was confirmed that ", "It was noted that ",
    "{person} confirmed that ", "{person} reported that ", "The secretary announced that ",
    "{person} reminded everyone that ", "To avoid doubt, ", "The chair stated that ", "As of today, ",
    "{person} had checked, and ", "In answer to {person}, it was said that ", "It is now settled that ",
)  # fmt: skip

DECISION_LEADS: tuple[str, ...] = (
    "Decision {k}: to {d}.", "Decision {k}: it was agreed to {d}.",
    "Decision {k}: the meeting resolved to {d}.",
    "Decision {k}, carried without a vote: to {d}.", "The chair put decision {k} on record: to {d}.",
    "After a show of hands, decision {k} was taken: to {d}.", "{person} read out decision {k}: to {d}.",
)  # fmt: skip

DECISIONS: tuple[str, ...] = (
    "move the {collection} to {place}", "open a second {facility} in {place}",
    "rent the {facility} in {place}",
    "invite {outsider} to the next meeting", "buy the {equipment} from {company}",
    "name the {room} after {outsider}", "close the {facility} in {place} for {small} weeks",
    "share the {facility} with the town of {place}", "sell the {equipment} to {company}",
    "hire {small} {workers} for the {facility}", "lend the {collection} to the museum in {place}",
    "print {hundreds} copies of the {paperwork}", "send the {paperwork} to {outsider}",
    "paint the {room} {colour} before the summer", "limit the {room} to {small} people",
    "keep the {facility} in {place} open on Sundays", "ask {outsider} to value the {collection}",
    "repair the {equipment} together with {company}", "give the {equipment} to the school in {place}",
    "store the {collection} with {company}", "end the agreement with {company}",
    "set up a {small}-member panel on the {facility}", "publish the {paperwork} before the end of {month}",
)  # fmt: skip

MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November",
    "December",
)  # fmt: skip

SMALL_NUMBERS: tuple[str, ...] = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

FIRST_NAMES: tuple[tuple[str, ...], tuple[str, ...]] = (
    ("Al", "An", "Ar", "Bel", "Ber", "Bri", "Cal", "Car", "Cor", "Dal", "Dar", "Dor", "Ed", "El", "Em",
     "Er",
     "Fen", "Fer", "Gar", "Gil", "Hal", "Har", "Hel", "Il", "Is", "Jan", "Jor", "Kar", "Kel", "Lan",
     "Len", "Lor",
     "Mal", "Mar", "Mel", "Mir", "Nor", "Ol", "Or", "Per", "Ral", "Ren", "Ros", "Sal", "Sel", "Tal",
     "Tam", "Ter",
     "Tor", "Val", "Ver", "Wil", "Yor", "Zel"),
    ("a", "an", "en", "in", "ia", "is", "on", "ric", "win", "wyn", "da", "na", "ra", "ta", "vin", "mund",
     "eth",
     "ina", "ette", "o", "as", "us", "ard", "ey", "ander", "elle", "ian", "ora"),
)  # fmt: skip

SURNAMES: tuple[tuple[str, ...], tuple[str, ...]] = (
    ("Ash", "Bar", "Black", "Bram", "Brook", "Burn", "Carl", "Chal", "Clay", "Cold", "Cran", "Crow",
     "Dray", "Dun",
     "East", "Elm", "Fair", "Fal", "Fern", "Flax", "Ford", "Fox", "Glen", "Gold", "Gran", "Green", "Hag",
     "Hart",
     "Hazel", "Heath", "Holm", "Horn", "Ing", "Kent", "Kings", "Lang", "Lind", "Lock", "Long", "Mead",
     "Mill",
     "Moor", "New", "Oak", "Old", "Pem", "Pen", "Rad", "Raven", "Red", "Rush", "Salt", "Sand", "Sed",
     "Shel",
     "Stan", "Stone", "Strat", "Thorn", "Under", "Wal", "Wake", "West", "Whit", "Win", "Wood", "Wyn",
     "Yar"),
    ("ford", "well", "mere", "by", "ton", "wick", "ley", "worth", "combe", "stead", "gate", "more", "field",
     "ridge", "shaw", "thorpe", "den", "ham", "hurst", "kirk", "borough", "bury", "dale", "garth",
     "grove", "holt",
     "land", "low", "man", "marsh", "mouth", "pool", "sey", "side", "stow", "vale", "wall", "water", "way",
     "yard"),
)  # fmt: skip

RULES: dict[str, tuple[str, ...]] = {
    # Values made of words.
    "company": ("{placename} and Sons", "{placename} Brothers", "{placename} Works", "{placename} Partners",
                "{placename} and {placename}", "{placename} Services", "{placename} Limited"),
    "venue": ("{placename} Hall", "{placename} House", "{placename} Lodge", "{placename} Court",
              "{placename} Gardens", "{placename} Library", "{placename} Mill"),
    "place": ("{placename}",),
    "collection": ("map collection", "costume collection", "film archive", "seed bank", "model ships",
                   "old ledgers", "photograph albums", "coin cabinet", "herbarium", "portrait series",
                   "letters of the founder", "glass negatives"),
    "facility": ("depot", "reading room", "workshop", "nursery", "day centre", "tea room", "boat yard",
                 "rehearsal space", "repair cafe", "information point", "training kitchen", "youth club"),
    "equipment": ("delivery van", "stage lights", "book scanner", "coffee machine", "printing press",
                  "forklift",
                  "sound desk", "tractor", "laser cutter", "piano", "minibus", "telescope"),
    "room": ("main hall", "upper gallery", "blue room", "west wing", "conference room", "lecture theatre",
             "inner courtyard", "library corner", "long corridor", "studio"),
    "workers": ("gardeners", "drivers", "tutors", "carpenters", "cooks", "guides", "cleaners", "stewards"),
    "paperwork": ("annual report", "visitor guide", "safety handbook", "five-year plan", "members' letter",
                  "house rules", "list of donors", "training manual"),
    "colour": ("dark green", "light grey", "pale yellow", "white", "deep blue", "warm red"),
    "board": ("board of trustees", "steering committee", "management committee", "house committee",
              "programme council", "working group", "finance committee", "estates committee"),
    "body": ("{placename} Community Trust", "{placename} Museum", "{placename} Harbour Society",
             "{placename} Cottage Hospital", "{placename} Arts Centre", "Friends of {placename} Park",
             "{placename} Library Association", "{placename} Housing Cooperative"),
    "agenda": ("Matters arising", "Report of the treasurer", "Buildings and grounds",
               "Programme for the season",
               "People and volunteers", "Correspondence", "Partnerships", "Health and safety", "Equipment",
               "Communications", "Membership", "Planning", "Reports from the groups", "Any other business",
               "Visitors and bookings", "Contracts and suppliers", "Digital matters", "Looking ahead"),
    # Any subject of a fact, in passing and without a value.
    "topic": ("{project}", "{project}", "{project}", "{event}", "{paper}", "{door}", "{desk}"),
    "matter": ("{topic}", "{topic}", "{topic}", "{thing}"),
    "thing": ("boiler", "gutter", "front door", "notice board", "piano lid", "hedge", "suggestion box",
              "old till", "projector", "carpet in the hall", "coffee corner", "guest book",
              "parking permit",
              "staircase", "dishwasher", "clock above the door", "flagpole", "fish tank", "poster frame",
              "welcome leaflet", "spare key", "rain barrel", "photocopier", "picnic table", "display case",
              "hearing loop", "umbrella stand", "map by the entrance", "tea urn", "wheelchair ramp"),
    "group": ("the members", "the neighbours", "the volunteers", "the younger staff", "the visitors",
              "the cleaning team", "the trustees", "the parents", "the tenants", "the school classes",
              "the regular guests", "the drivers", "the people at the front desk", "the donors",
              "the exhibition team", "the evening shift"),
    "feeling": ("relieved", "a little worried", "curious", "pleased", "not fully convinced", "surprised",
                "grateful", "doubtful", "quietly optimistic", "tired of the subject", "in two minds",
                "more hopeful than last time"),
    "quality": ("useful", "overdue", "harmless", "more work than it looks", "worth the effort",
                "too ambitious",
                "well prepared", "hard to explain", "simpler than feared", "popular", "a distraction",
                "only half finished", "better than its reputation", "badly timed", "a matter of patience"),
    "when": ("last spring", "in the autumn", "during the holidays", "before the storm", "some years ago",
             "at the previous meeting", "over the weekend", "the other morning", "on a rainy afternoon",
             "in the first week of term", "while the lift was out of order", "shortly before closing time",
             "when the heating failed", "on market day", "after the flood", "early in the year"),
    "said": ("said", "remarked", "thought", "pointed out", "felt", "suggested", "repeated", "explained",
             "observed", "admitted", "insisted", "noted"),
    "asked": ("asked", "wondered", "wanted to know", "was not sure", "inquired", "asked once more"),
    "reason": ("nobody had expected it", "the weather had turned", "the paperwork takes time",
               "two people were on leave", "the road was closed", "the printer had run out of paper",
               "the figures were not ready", "the keys had been mislaid", "the school holidays came first",
               "the instructions were unclear", "the room was double booked", "everyone had been very busy",
               "the old list was out of date", "the delivery came to the wrong door", "it was only a draft",
               "the photographs had not arrived"),
    "act": ("look at it again", "write a short note about it", "speak to {group}",
            "bring a sketch next time",
            "leave it for now", "ask around", "compare it with other houses", "put up a sign",
            "collect a few opinions", "find a quieter time", "measure everything twice",
            "keep an eye on it",
            "tidy up the file", "make a list of open points", "try it on a small scale",
            "phone the neighbours first", "sleep on it", "wait for better weather"),
    "claim": (
        "the {matter} was {quality}", "the {matter} had been {quality} {when}",
        "{group} were {feeling} about the {matter}", "the {matter} should not be rushed",
        "it was too early to judge the {matter}", "the {matter} and the {matter} should be seen together",
        "there had been complaints about the {thing} {when}", "{group} rarely mention the {matter}",
        "the {thing} needs attention before anyone thinks of the {matter}",
        "someone ought to {act}", "it would be wise to {act}", "the {matter} was delayed because {reason}",
        "nobody had touched the {thing} since it was repaired {when}",
        "a second opinion on the {matter} would do no harm",
        "{group} would rather hear about the {matter} in person",
        "the {matter} looked different from the outside",
        "the tone of the letter about the {matter} was friendly",
        "most of the trouble with the {thing} comes from habit", "the {matter} is {quality}, but only just",
        "other houses treat the {matter} with more calm", "the {matter} had grown {quality} over time",
        "the minutes of the last meeting were {quality} on the {matter}",
        "people confuse the {matter} with the {matter}", "one should first {act} and then {act}",
    ),
    "question": (
        "whether the {matter} could wait", "whether {group} had been told about the {matter}",
        "why the {thing} was still not in place", "what had become of the {thing}",
        "how {group} would take it", "whether the {matter} would get in the way of the {matter}",
        "who had last seen the {thing}", "if it was not better to {act}",
        "whether anyone had thought of {group}", "how other houses deal with the {matter}",
        "whether the {matter} was still {quality}", "if the {matter} had been mixed up with the {matter}",
        "why it had seemed so easy {when}",
    ),
    # Sentences of the talk.
    "talk": (
        "{person} {said} that {claim}.", "{person} {said} that {claim}.", "{person} {said} that {claim}.",
        "{person} {asked} {question}.", "{person} {asked} {question}.",
        "{person} {said} that {claim}, and {person} agreed.",
        "{person} {said} that {claim}, while {person} {said} that {claim}.",
        "{person} {asked} {question}, since {reason}.",
        "{person} was {feeling} and {said} that {claim}.",
        "{person} offered to {act}.", "{person} promised to {act}, if {group} agree.",
        "{person} had spoken with {group} {when} and came away {feeling}.",
        "To this {person} replied that {claim}.", "Against this, {person} held that {claim}.",
        "There was a short exchange between {person} and {person} about the {matter}.",
        "The {matter} came up again, mostly because {reason}.",
        "On the {matter}, opinions differed: some found it {quality}, others {quality}.",
        "{group_start} had sent a kind note about the {matter}.",
        "Nobody objected, although {person} looked {feeling}.",
        "{person} told a story about the {thing} that made the room laugh.",
        "{person} compared the {matter} to the {thing}, which helped.",
        "In the end the {matter} was left for another day, as {reason}.",
        "{person} warned that {claim}.", "{person} thanked {person} for the work on the {matter}.",
        "A remark by {person} on the {matter} was noted but not discussed.",
        "The feeling in the room was that {claim}.", "{person} did not think that {claim}.",
        "It was {person} who first said that {claim}.",
        "{person} and {person} will {act} and {act}.",
    ),
    "aside": (
        "Rain could be heard on the roof for much of this item.", "The windows were opened for a while.",
        "Tea was served, and the biscuits were gone within minutes.",
        "A delivery at the side door interrupted the talk for a moment.",
        "The clock struck, and the chair asked for shorter answers.",
        "{person} arrived late because {reason} and apologised.",
        "{person} had to leave the room for a telephone call.",
        "A dog barked in the yard, to general amusement.",
        "The projector refused to start, so {person} read the slides aloud.",
        "Someone had left a bicycle in the corridor, and it was moved.",
        "The lights flickered twice, which {person} blamed on the {thing}.",
        "{person} passed around an old photograph of the {room}.",
        "There followed a digression on gardening, led by {person}.",
        "The conversation drifted to trains and came back slowly.",
        "{person} recalled how {group} once lost the {thing} {when}.",
        "For a few minutes everybody talked at once.",
        "{person} had brought plums from the garden and set them on the table.",
        "The chair asked that telephones be put away.",
        "A visitor looked in, found the wrong meeting and withdrew.",
        "The secretary asked the speakers to slow down.",
        "{person} spoke at some length about a holiday by the sea.",
        "The old question of the {thing} was raised and quickly dropped.",
    ),
    "recap": (
        "The chair summed up and moved on.", "The item was closed without further remarks.",
        "With thanks to {person}, the chair called the next point.",
        "The chair noted that views on the {matter} had not changed.",
        "All of this will be in the notes that {person} keeps.",
        "Nothing more was said about the {matter}.",
        "The report was taken as read.", "{person} will circulate the papers that were mentioned.",
        "The discussion ended in good humour.",
        "A fuller account of the {matter} is promised for next time.",
        "The chair repeated that what counts is what is written here.",
        "On this point the meeting was of one mind.",
        "It was agreed that nothing needed to be agreed here.",
    ),
    # Figures, dates, codes and names that no question asks for.
    "noise": (
        "{person} recalled that the {thing} had cost {amount} {when}.",
        "A neighbour had offered {amount} for the {thing}, which caused some laughter.",
        "The collection box by the {thing} held {amount}.",
        "A ticket with the number {reference} was found under the {thing}.",
        "The sticker on the {thing} says {code}, but nobody knows why.",
        "The serial number of the {thing} was read out as {reference}.",
        "{person} had counted {quantity} visitors on a single day.",
        "There are still {quantity} leaflets in the cellar.",
        "The letter about the {thing} was dated {date}.",
        "The {thing} was last cleaned on {date}, according to the card.",
        "A postcard from {outsider} was passed around.",
        "{outsider} had written to praise the {thing}.",
        "The {thing} once belonged to {outsider}, as {person} likes to tell.",
        "A brochure from {company} lay on the table, unread.",
        "Someone from {company} had called about the {thing} and will call again.",
        "An excursion to {venue} was remembered fondly.",
        "The radio in the corridor only receives channel {extension}.",
        "{person} drives past {venue} every day and {said} that {claim}.",
        "The parking fine of {amount} from {date} has been settled.",
        "The choir of {placename} rehearsed next door, {quantity} voices by the sound of it.",
        "The form for the {thing} bears the mark {code} in pencil.",
        "The bus from {placename} was late again.",
        "The photograph of {outsider} in the {room} hangs crooked.",
    ),
}  # fmt: skip

ROLES: tuple[str, ...] = (
    "chair", "secretary", "treasurer", "buildings", "programme", "volunteers", "communications", "events",
    "membership", "staff side",
)  # fmt: skip
