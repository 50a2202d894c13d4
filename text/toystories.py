"""Toy stories: an endless supply of short, simple children's tales, so that the lab can train with nothing to download.

    >>> from text.toystories import stories
    >>> print(next(stories("train", 1)))  # doctest: +NORMALIZE_WHITESPACE, +ELLIPSIS
    Ben was a helpful boy. He lived near the forest with his dad. One afternoon, Ben got six figs from his dad. Ben took
    them outside and sat by the well.
    Soon, a boy named Leo came by. "I have no food today," said Leo. Ben thought about it for a while. "You can have one
    fig," said Ben. Now Ben had five figs. ...

What a model reads here depends on what it remembers. Every story names a few things early (a hero and a pronoun, a
friend, a coloured toy, a hiding place, a number of apples, a promise) and needs them again many sentences later. A
model that looks only at the last few words writes fluent sentences about the wrong ball in the wrong place.

A plot is one function that returns a script. In a script each line is a beat of the story, `|` stands between its
phrasings (one is drawn; an empty one leaves the beat out; a line that starts with `|` goes on with the beat above),
and a blank line ends a paragraph. To add a plot, write one more function, set `s.thing` to the words that must come
back towards the end, and append it to PLOTS. Any change of wording changes the data set; a golden test notices.

Left out on purpose: grammar machinery, options, and a command line (tinystories.py calls this file).
"""

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

TRAIN_STORIES = 12_000  # about 9 MB of text
VAL_STORIES = 600
WORDS = (80, 180)  # fewest and most words in a story; a draft outside is drawn again
VAL_ONE_IN = 10  # one text in ten, chosen by its checksum, belongs to val and never to train

GIRLS = ("Mia", "Anna", "Sue", "Lucy", "Emma", "Ella", "Zoe", "Amy", "Nora", "Jane", "Kim", "Sara")
BOYS = ("Tom", "Ben", "Tim", "Max", "Sam", "Jack", "Leo", "Finn", "Bob", "Dan", "Joe", "Nick")
ANIMALS = ("cat", "dog", "rabbit", "bear", "fox", "mouse", "duck", "frog", "owl", "pig", "squirrel", "elephant")
TRAITS = ("kind", "good", "clever", "gentle", "friendly", "cheerful", "polite", "sweet", "helpful", "nice")
HOMES = ("near the forest", "by the lake", "on a small hill", "in a small town", "on a farm", "next to a river")
COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "white")
TOYS = ("ball", "kite", "doll", "truck", "boat", "drum", "book", "robot", "train", "bell")
FOODS = ("apple", "carrot", "plum", "nut", "pear", "banana", "fig")
SPOTS = ("under the old tree", "behind the barn", "next to the pond", "near the bridge", "in the tall grass",
         "by the well", "behind the big rock", "by the old gate")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def a(noun: str) -> str:
    """The noun with its article: a("red ball") -> "a red ball", a("orange kite") -> "an orange kite"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def some(n: int, noun: str) -> str:
    """A counted noun: some(1, "plum") -> "one plum", some(3, "plum") -> "three plums"."""
    return f"{NUMBERS[n]} {noun}{'' if n == 1 else 's'}"


def up(text: object) -> str:
    """The text as a sentence begins: up("his mom") -> "His mom"."""
    return str(text)[0].upper() + str(text)[1:]


def pick(rng: random.Random, options):
    """One of the options. Only rng.random() is the same in every version of Python, so every draw uses it."""
    return options[int(rng.random() * len(options))]


@dataclass(frozen=True)
class Who:
    """Someone in a story; prints as the name: f"{h} lost {h.his} hat." -> "Mia lost her hat."."""

    name: str
    kind: str  # "girl", "boy" or an animal
    trait: str
    he: str
    him: str
    his: str

    def __str__(self) -> str:
        return self.name

    @property
    def He(self) -> str:
        return up(self.he)

    @property
    def His(self) -> str:
        return up(self.his)

    @property
    def full(self) -> str:
        """How a newcomer is introduced: "a girl named Mia", "Max the fox"."""
        return f"{a(self.kind)} named {self}" if self.kind in ("girl", "boy") else f"{self} the {self.kind}"


@dataclass
class Scene:
    """What stays the same throughout one story, and its random numbers."""

    rng: random.Random
    hero: Who
    friend: Who
    other: Who  # a third one: a helper, a judge, a neighbour
    parent: Who  # the hero's; prints as "her mom"
    colour: str
    spot: str  # "under the old tree"
    thing: str = ""  # set by each plot: words named early that return towards the end

    def one(self, *options):
        """One of several things to tell, or of several ways to tell them."""
        return pick(self.rng, options)

    def day(self) -> str:
        return self.one("One day", "One morning", "One sunny day", "One afternoon", "One warm day")

    def opening(self) -> str:
        """Who the story is about: "Once upon a time, there was a kind little girl named Mia."."""
        h, home = self.hero, self.one(*HOMES)
        who = a(f"{h.trait} {self.one('', 'little ', 'young ')}{h.kind}")
        return self.one(
            f"Once upon a time, there was {who} named {h}.", f"Once upon a time, {who} named {h} lived {home}.",
            f"Once there was {who} named {h}. {h.He} lived {home}.", f"{h} was {who} who lived {home}.",
            f"{h} was {who}. {h.He} lived {home} with {self.parent}.", f"There once was {who}. {h.His} name was {h}.",
            f"In a house {home}, there lived {who} named {h}.", f"This is the story of {h}, {who}.")


def scene(rng: random.Random) -> Scene:
    """A fresh cast and setting; in one cast no two share a name, and no two animals are of one kind."""
    names, animals = list(GIRLS + BOYS), list(ANIMALS)

    def who() -> Who:
        name = pick(rng, names)
        names.remove(name)
        kind = pick(rng, animals) if rng.random() < 0.5 else "girl" if name in GIRLS else "boy"
        if kind in animals:
            animals.remove(kind)
        return Who(name, kind, pick(rng, TRAITS), *(("she", "her", "her") if name in GIRLS else ("he", "him", "his")))

    hero, friend, other = who(), who(), who()
    parent = pick(rng, (Who(f"{hero.his} mom", "mom", "", "she", "her", "her"),
                        Who(f"{hero.his} dad", "dad", "", "he", "him", "his")))
    return Scene(rng, hero, friend, other, parent, pick(rng, COLOURS), pick(rng, SPOTS))


# The plots. In each, h is the hero, f the friend, o the other, p the parent; the docstring says what must come back.


def lost_and_found(s: Scene) -> str:
    """The toy is left at a spot named early; the friend's question brings the spot, and the toy, back."""
    h, f, spot = s.hero, s.friend, s.spot
    s.thing = toy = f"{s.colour} {s.one(*TOYS)}"
    return f"""
    {s.opening()}
    {h} had {a(toy)} and took it everywhere. | {h.His} best toy was {a(toy)}. | {h.He} got {a(toy)} from {s.parent}.
    {s.day()}, {h} played with the {toy} {spot}. | {s.day()}, {h} took it outside and played {spot}.
    Then it was time to eat, so {h.he} ran home. | Soon {h.he} got hungry and ran home to eat.

    Later, {h} looked for the {toy}, but it was gone. | At home, {h} could not find the {toy}.
    {h.He} looked under the bed and behind the door. | {h.He} looked in every room of the house. |
    {h} felt very sad. | {h} began to cry. | {h} did not know what to do.
    Then {h.his} friend {f} came by. | Just then, {f.full} walked by.
    "What is wrong, {h}?" asked {f}. | "Why are you so sad, {h}?" asked {f}.
    "I lost my {toy}," said {h}. | "My {toy} is gone," said {h}.
    "Where did you see it last?" asked {f}. | "Where did you play with it?" asked {f}.
    {h} thought hard. "I played {spot}!" {h.he} said. | "I think I was {spot}," said {h}.

    They ran back as fast as they could. | They went there together. | "Let us go and look," said {f}.
    There it was! The {toy} was {spot}. | And there, {spot}, was the {toy}!
    "Thank you, {f}!" said {h}. | {h} gave {f} a big hug.
    They played with the {toy} until the sun went down. | {h} let {f} play with it first. |
    From that day on, {h} always took the {toy} home after playing.
    | It is good to stop and think when something is lost. | That night, {h} slept with the {toy} next to {h.him}.
    """


def sharing(s: Scene) -> str:
    """A counted snack shrinks by one with each gift, and those who got a gift give back."""
    h, f, o, p = s.hero, s.friend, s.other, s.parent
    s.thing = food = s.one(*FOODS)
    n = s.one(3, 4, 5, 6)
    return f"""
    {s.opening()}
    {s.day()}, {p} gave {h.him} {some(n, food)}. | {s.day()}, {h} got {some(n, food)} from {p}.
    {h} sat down {s.spot} to eat. | {h} took them outside and sat {s.spot}.
    "I will eat all {NUMBERS[n]} of them," {h.he} said. | {h.He} was very hungry. |

    Soon, {f.full} came by. | Then {h.his} friend {f} came and sat next to {h.him}.
    "I have no food today," said {f}. | "I am so hungry," said {f}.
    {h} looked at the {food}s. Then {h.he} looked at {f}. | {h} thought about it for a while.
    "You can have one {food}," said {h}. | "Here, this {food} is for you," said {h}.
    Now {h} had {some(n - 1, food)}.
    After a while, {o.full} came too. | Then {o.full} came, and {o.he} looked sad.
    {h} gave {o} one {food} as well. | "Would you like one too?" asked {h}, and {o} took one {food}.
    Now {h} had {'only ' if n == 3 else ''}{some(n - 2, food)} left. | That left {h} with {some(n - 2, food)}.

    They all ate {s.spot} and laughed. | The three friends sat {s.spot} and ate.
    "This is the best {food} ever," said {f}. | "You are {a(h.trait)} {h.kind}, {h}," said {o}. |

    The next day, {h} had no food at all. | A week later, {h} had nothing to eat.
    But {f} and {o} had not forgotten the {food}s. | But {f} and {o} still thought of the {food}s.
    They came with a big basket and shared it with {h}. | They gave {h} bread and a pot of honey.
    {h} was glad that {h.he} had shared. | When you share, you make good friends.
    """


def facing_a_fear(s: Scene) -> str:
    """The fear named early is the very thing between the hero and the friend's toy."""
    h, f = s.hero, s.friend
    fear, where, went = s.one(
        ("the dark", "in a dark cave", "walked into the dark cave"),
        ("deep water", "in a deep pond", "jumped into the deep pond"),
        ("high places", "at the top of a tall tree", "climbed up the tall tree"),
        ("spiders", "in an old barn", "went into the old barn"),
        ("loud noises", "next to a loud train", "walked up to the loud train"))
    s.thing = toy = f"{s.colour} {s.one('ball', 'hat', 'plane', 'ring')}"
    return f"""
    {s.opening()}
    {h} was afraid of {fear}. | There was one thing {h} did not like, and that was {fear}.
    {h} told no one about it. | "What if something bad happens?" {h.he} often said. |

    {s.day()}, {h} played with {h.his} friend {f}. | {s.day()}, {f.full} came to play with {h}.
    {f} had {a(toy)}. | {f} came with {a(toy)}.
    {f} threw it too far, and it landed {where}. | They threw it up high, and then it was {where}.
    "Oh no! My {toy}!" said {f}. | "My grandma gave me that {toy}," cried {f}.
    {f} had hurt {f.his} foot and could not get it. | {f} sat down and cried.

    {h} began to shake. | {h} felt {h.his} heart beat fast. | {h} wanted to run away.
    "I am afraid of {fear}, but I will try," {h.he} said. | {h.He} was so afraid of {fear}! But {f} needed help.
    {h} took a deep breath and {went}. | {h} counted to three and {went}.
    It was not as bad as it looked. | "I can do it," {h.he} said again and again. |
    Soon {h.he} saw the {toy} and picked it up. | Then {h.he} found the {toy} and brought it back.

    "Here is your {toy}," said {h} with a big smile. | {h} gave the {toy} to {f}.
    "You are so brave, {h}!" said {f}. | "Thank you! You are a very brave {h.kind}," said {f}.
    After that, {h} was not so afraid of {fear}. | {h} was not afraid of {fear} anymore.
    """


def rescue(s: Scene) -> str:
    """What is laughed at in the beginning saves the one who laughed."""
    h, f, o = s.hero, s.friend, s.other
    s.thing = rope = f"{s.colour} {s.one('rope', 'scarf', 'ribbon', 'blanket')}"
    stuck = s.one("in the mud", "in a deep hole", "in the cold river", "in a thick bush")
    return f"""
    {s.opening()}
    {h} had {a(rope)}. It was very long. | {h.His} grandma made {h.him} {a(rope)}. It was very long.
    "What a silly thing!" said {f.full}. | {up(f.full)} laughed at it.
    But {h} liked {h.his} {rope} and kept it. | "It may help me some day," said {h}.

    {s.day()}, {h} went for a walk with {h.his} friend {o}. | {s.day()}, {h} played with {o.full}.
    "Help! Help!" someone called. | They heard someone cry for help.
    It was {f}! {f.He} was stuck {stuck}. | They ran and saw {f}, who was stuck {stuck}.
    "I cannot get out!" said {f}. | "Please help me," said {f}.
    {o} tried to reach {f}, but it was too far. | "What can we do?" asked {o}.

    Then {h} had an idea. | Then {h} thought of the {rope}.
    {h.He} took the {rope} and threw one end to {f}. | {h.He} threw {f} one end of the {rope}.
    "Hold on tight!" said {h}. | "Take it and do not let go!" said {h}.
    {h} and {o} pulled and pulled. | "One, two, three!" said {o}, and they pulled hard.
    At last, {f} was out. | Pop! {f} came out.

    "I am sorry that I laughed at your {rope}," said {f}. | "Your {rope} is not silly," said {f}.
    "That is all right," said {h}. | "I am glad you are safe," said {h}. |
    No one laughed at it ever again. | After that day, {f} wanted {a(rope)} too. | {h} and {f} became good friends.
    """


def building(s: Scene) -> str:
    """What is built, and of what, stays the same when it falls and is built again; so does the flag on top."""
    h, f = s.hero, s.friend
    what, of = s.one("tower", "house", "castle", "bridge"), s.one("sand", "wood", "stones", "blocks", "sticks", "snow")
    s.thing = made = f"{what} of {of}"
    flag = f"{s.colour} flag"
    advice = s.one("make every side thick", "start with a wide bottom", "work slowly and with care")
    return f"""
    {s.opening()}
    {s.day()}, {h} wanted to build a big {made}. | {s.day()}, {h} said, "I will build a {made}!"
    {h.He} had {a(flag)} to put on top. | {up(s.parent)} gave {h.him} {a(flag)} to put on top.
    {h} worked all morning {s.spot}. | {h.He} found a good place {s.spot} and began to work.

    The {what} grew and grew. | Soon the {what} was almost done. |
    Then a strong wind came. | Then a big bird bumped into it. | But it was too thin on one side.
    Crash! The {made} fell down. | The {what} began to shake, and then it fell down. Crash!
    "I give up," said {h}. | "All my work is gone," cried {h}.

    {up(f.full)} heard the crash and came to see. | {h.His} friend {f} came to help.
    "Do not give up," said {f}. "This time, let us {advice}." | "I know what to do," said {f}. "Let us {advice}."
    {f} brought more {of} for a new {what}. | So {f} carried the {of}, and {h} built the {what} again.
    It took a long time. | They sang a song as they worked. |

    At last, the new {made} was ready. | When the sun went down, they had a new {made}.
    {h} put the {flag} on top. | {h} let {f} put the {flag} on top.
    The wind came again, but nothing fell. | They pushed it a little, and it did not move. |
    "We did it!" said {h}. | "It is better than before," said {h}.
    It is good to try again. | {h} was glad that {f} had told {h.him} to {advice}.
    """


def windy_day(s: Scene) -> str:
    """The wind takes a hat; the way it went is asked for, and at the end of the way someone needs it more."""
    h, f, o, p = s.hero, s.friend, s.other, s.parent
    s.thing = hat = f"{s.colour} {s.one('hat', 'scarf', 'coat')}"
    place = s.one("bridge", "mill", "farm", "school", "lake", "forest")
    return f"""
    {s.opening()}
    It was cold, so {p} made {h.him} {a(hat)}. | {h.He} had {a(hat)} that {p} had made.
    One windy day, {h} went out to play. | One cold day, {h} went for a walk.
    Whoosh! The wind blew the {hat} away. | A strong wind came and took the {hat} away.
    "Come back!" cried {h}. | {h} ran after it, but the wind was too fast.

    On the way, {h} met {f.full}. | Soon {h} saw {h.his} friend {f}.
    "Did you see {a(hat)}?" asked {h}. | "The wind took my {hat}! Did you see it?" asked {h}.
    "Yes," said {f}. "It flew to the {place}." | "I did," said {f}. "It went over to the {place}."
    {h} and {f} went to the {place} together. | "Thank you!" said {h} and ran to the {place}.

    At the {place}, {h} found {o.full}. | There, at the {place}, sat {o.full}.
    {o} had the {hat} and held it close. | The {hat} was on {o}, who was very cold.
    "This {hat} fell from the sky, and now I am warm," said {o}. | "I was cold, but now I have this {hat}," said {o}.
    {h} wanted it back, but then {h.he} saw how happy {o} was. | {h} thought about it for a while.
    "You can keep the {hat}," said {h}. | "It is yours now," said {h}.

    At home, {h} told {p} about {o} and the {hat}. | {h} went home and told {p} about {o}.
    "You are {a(h.trait)} {h.kind}, {h}," said {p}. | {up(p)} gave {h} a hug.
    The next day, {h} had a new {hat}, just like the old one. | Then {p.he} made a new {hat} for {h}.
    """


def baking(s: Scene) -> str:
    """A birthday cake lacks what it is named for; a neighbour helps for a promise, and the promise is kept."""
    h, f, o, p = s.hero, s.friend, s.other, s.parent
    s.thing = food = s.one(*FOODS)
    promise = s.one("a big piece of the cake", "the first piece of the cake", "a pretty flower", "a pretty picture")
    return f"""
    {s.opening()}
    {h.His} friend {f} had a birthday. | It was the birthday of {h.his} friend {f}.
    {f} loved {food}s, so {h} wanted to bake {a(food)} cake. | "I will bake {a(food)} cake for {f}," said {h}.

    {h} looked in the kitchen. | {h} went into the kitchen with {p}.
    There were eggs and milk, but no {food}s. | {h.He} found eggs, milk, and honey, but not one {food}.
    "What can I do?" {h.he} said. | "Oh no!" said {h}. |
    {h} went to {o.full}, who had many {food}s. | {h} knew that {o.full} had a garden full of {food}s.
    "May I have some {food}s for a cake?" asked {h}. | "Please, may I take a few {food}s?" asked {h}.
    "Yes," said {o}. "But you must give me {promise}." | "You may, if you give me {promise}," said {o}.
    "I promise," said {h}. | {h} said, "I promise!"

    {h} ran home and baked the cake. | At home, {h} mixed everything, and {p} helped {h.him} bake it.
    Soon the house smelled sweet. | It smelled so good! |
    "Happy birthday, {f}!" said {h}. | {h} brought the cake to {f}. "Happy birthday!" {h.he} said.
    "{up(a(food))} cake! I love {food}s!" said {f}. | "{up(food)}s are the best," said {f} and took a big bite.

    Then {h} thought of {h.his} promise. | But {h} did not forget {h.his} promise.
    {h.He} went to {o} and gave {o.him} {promise}. | {h.He} gave {o} {promise}.
    "You kept your promise," said {o} with a smile. | {o} was very happy. |
    It was a good day for all three. | A good friend always keeps a promise.
    """


def race(s: Scene) -> str:
    """The start and the end of the way, and the prize, are named first; the slow one stops to help and shares it."""
    h, f, o = s.hero, s.friend, s.other
    s.thing = prize = f"{s.colour} {s.one('ribbon', 'cup', 'star', 'flag')}"
    goal = s.one("the old mill", "the long bridge", "the tall tree", "the lake", "the school", "the old barn")
    return f"""
    {s.opening()}
    {s.day()}, there was a race to {goal}. | {s.day()}, everyone came for the big race to {goal}.
    {up(o.full)} had {a(prize)} for the winner. | "The first one there gets {a(prize)}," said {o.full}.
    {h} was not very fast, but {h.he} wanted to try. | {h} was slow, but {h.he} liked to run.
    "I am the fastest {f.kind} of all," said {f}. | {up(f.full)} laughed. "I will win," {f.he} said.

    "Ready, set, go!" called {o}. | "One, two, three, go!" called {o}.
    {f} ran ahead, and soon {h} could not see {f.him}. | {f} ran like the wind, and {h} came after.
    But {f} did not look down and fell over a stone. | But then {f} fell into a hole.
    "Ouch! My foot hurts," cried {f}. | "I cannot get up," said {f}.

    {h} came by. Now {h.he} could win the {prize}! | Then {h} came. {h.He} could be the first now.
    But {h} stopped. | {h} looked at {goal}, and then {h.he} looked at {f}. | But {h} felt sorry.
    "Take my arm, {f}," {h.he} said. "We will go together." | {h} helped {f} up and held {f.his} arm.
    Step by step, they walked to {goal}. | They were slow, but they came to {goal} side by side.

    Everyone clapped. | All their friends were waiting there. |
    "Who gets the {prize}?" asked {o}. | {o} held up the {prize}.
    "{h} should have it," said {f}. "{h.He} stopped to help me." | "Give it to {h}," said {f}.
    So {h} got the {prize} and shared it with {f}. | "It is for both of us," said {h} and let {f} hold the {prize}.
    To be kind is better than to be fast. | From then on, {h} and {f} always ran together.
    """


def strange_noise(s: Scene) -> str:
    """A sound in the night, a place it comes from, and the animal that makes just that sound."""
    h, f = s.hero, s.friend
    noise, maker, why = s.one(
        ("tap, tap, tap", "bird", "cold"), ("scratch, scratch", "kitten", "lonely"),
        ("squeak, squeak", "mouse", "hungry"), ("hop, hop, hop", "frog", "lost"),
        ("crunch, crunch", "rabbit", "hungry"), ("sniff, sniff", "puppy", "lonely"))
    s.thing = noise
    gave = {"cold": "a warm blanket", "lonely": "a soft hug", "hungry": "some bread", "lost": "a place to sleep"}[why]
    where = s.one("behind the door", "under the bed", "in the kitchen", "under the stairs", "outside the window")
    lamp = f"{s.colour} {s.one('lamp', 'light')}"
    return f"""
    {s.opening()}
    One night, {h.his} friend {f} slept at {h.his} house. | One night, {f.full} stayed with {h}.
    It was dark and quiet. | The moon was big and round. | They told stories in bed. |
    Then they heard a noise. "{up(noise)}." | Then something went, "{up(noise)}."
    "What was that?" asked {f}. | "Did you hear that?" asked {f}.

    "There is something {where}," said {h}. | "Someone is {where}," said {h}.
    "Maybe it is a monster!" said {f} and hid under a blanket. | "I am scared," said {f}.
    {h} was scared too, but {h.he} wanted to know. | "Let us go and see," said {h}.
    {h.He} took {a(lamp)}. | {h} had {a(lamp)} and turned it on.
    Step by step, they went to look {where}. | {f} held on to {h}, and they went to look {where}.
    "{up(noise)}," went the noise again.

    {h} held up the {lamp}. | The {lamp} made everything bright.
    It was not a monster. It was a little {maker}! | There, {where}, sat a little {maker}.
    "Oh, you are {why}," said {h}. | The little {maker} was {why}.
    {h} gave the {maker} {gave}. | So they gave it {gave}.
    {f} laughed. {f.He} was not scared anymore. | "So this was our monster," laughed {f}.

    After that, when {h} heard {noise} {where}, {h.he} smiled.
    | And when something went, "{up(noise)}," the next night, {h} knew that it was the {maker}.
    Things are not so scary when you look at them. | The {maker} became their friend.
    """


def lost_baby(s: Scene) -> str:
    """A lost little one says early where it lives and why it left; that is where they find its mom."""
    h, f = s.hero, s.friend
    baby = f"baby {s.one(*(kind for kind in ANIMALS if kind not in (h.kind, f.kind, s.other.kind)))}"
    s.thing = baby
    home = s.one("on the high hill", "by the big river", "next to the old mill", "near the sea", "in the dark forest")
    fly = f"{s.colour} {s.one('butterfly', 'bird', 'bug', 'leaf')}"
    return f"""
    {s.opening()}
    {s.day()}, {h} went for a walk with {f.full}. | {s.day()}, {h} played with {h.his} friend {f}.
    They saw a {baby} {s.spot}. | A {baby} sat {s.spot}, all alone.
    It was crying. | It looked very sad.

    "What is wrong?" asked {h}. | "Why are you here all alone?" asked {h}.
    "I am lost," said the {baby}. "I saw {a(fly)} and ran after it."
    | "I ran after {a(fly)}," said the {baby}. "Now I am lost."
    "Where do you live?" asked {f}. | "Where is your mom?" asked {f}.
    "We live {home}," said the {baby}. | "My mom is {home}," said the {baby}.
    "Do not cry. We will take you home," said {h}. | "We will help you," said {h} and {f}.

    They walked and walked. | It was a long way. | {h} carried the {baby}, and {f} sang a song.
    They asked {s.other.full} for the way. | They met {s.other.full}, who knew the way. |
    At last, {home}, they saw the mom. | Then they saw a house {home}. A mom was waiting there.
    "My baby!" she called and ran to the {baby}. | She ran to the {baby} and held it close.
    "I will not run after {a(fly)} again," said the {baby}. | "Next time you see {a(fly)}, call me first," said the mom.

    "Thank you, {h} and {f}," said the mom. | The mom gave {h} and {f} sweet cakes.
    | "You are {a(h.trait)} {h.kind}, {h}," said the mom.
    That night, {h} told {s.parent} about the {baby} who lived {home}.
    | After that, {h} and {f} often went to see the {baby} {home}.
    """


PLOTS = (lost_and_found, sharing, facing_a_fear, rescue, building, windy_day, baking, race, strange_noise, lost_baby)


def tell(plot, s: Scene) -> str:
    """The plot played in the scene: one phrasing of each beat; beats joined by spaces, paragraphs by newlines."""
    script = re.sub(r"\n *\|", "|", plot(s).strip())
    paragraphs = ([s.one(*beat.split("|")).strip() for beat in part.split("\n")] for part in script.split("\n\n"))
    return "\n".join(" ".join(filter(None, beats)) for beats in paragraphs)


def story(rng: random.Random) -> str:
    """One story of 80 to 180 words: plain ASCII, paragraphs separated by one newline."""
    while True:
        text = tell(pick(rng, PLOTS), scene(rng))
        if WORDS[0] <= len(text.split()) <= WORDS[1]:
            return text


def stories(split: str, count: int) -> Iterator[str]:
    """The first `count` stories of "train" or "val": always the same, all distinct, and never one of the other split.

    A larger count only appends. The checksum of a text decides which split may have it, so the splits cannot meet.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
    if count < 0:
        raise ValueError(f"count is {count}, expected 0 or more stories")
    return _draw(split, count)


def _draw(split: str, count: int) -> Iterator[str]:
    rng = random.Random(f"toystories/{split}")  # a str seeds through sha512, whatever PYTHONHASHSEED is
    seen = set()
    while len(seen) < count:
        text = story(rng)
        is_val = zlib.crc32(text.encode("ascii")) % VAL_ONE_IN == 0
        if is_val == (split == "val") and text not in seen:
            seen.add(text)
            yield text
