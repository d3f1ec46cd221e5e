"""The closed world of the demonstration model: its facts, words, names and phrasings.

Data only. demo_text.py makes questions from it and decides what is held out.
"""

from __future__ import annotations

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Austria": "Vienna", "Greece": "Athens", "Poland": "Warsaw",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Ireland": "Dublin", "Hungary": "Budapest", "Japan": "Tokyo", "China": "Beijing",
    "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima",
    "Cuba": "Havana", "Chile": "Santiago", "Canada": "Ottawa", "Australia": "Canberra",
    "Turkey": "Ankara", "Russia": "Moscow", "Morocco": "Rabat", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Belgium": "Brussels",
}  # fmt: skip

CONTINENTS = {
    "Europe": "France Germany Italy Spain Portugal Austria Greece Poland Norway Sweden Finland "
    "Denmark Ireland Hungary Belgium",
    "Asia": "Japan China India Thailand Vietnam",
    "Africa": "Egypt Kenya Morocco",
    "America": "Peru Cuba Chile Canada",
}

# animal: (legs, its young)
ANIMALS = {
    "cat": ("4", "kitten"), "dog": ("4", "puppy"), "cow": ("4", "calf"), "horse": ("4", "foal"),
    "sheep": ("4", "lamb"), "goat": ("4", "kid"), "pig": ("4", "piglet"), "bear": ("4", "cub"),
    "deer": ("4", "fawn"), "frog": ("4", "tadpole"), "hen": ("2", "chick"),
    "duck": ("2", "duckling"), "goose": ("2", "gosling"), "owl": ("2", "owlet"),
    "swan": ("2", "cygnet"), "kangaroo": ("2", "joey"), "eagle": ("2", "eaglet"),
}  # fmt: skip
MORE_LEGS = {
    "ant": "6", "bee": "6", "beetle": "6", "butterfly": "6", "spider": "8", "crab": "10",
    "snake": "0", "fish": "0", "worm": "0",
}  # fmt: skip

COLOURS = {
    "grass": "green", "snow": "white", "the sky": "blue", "a lemon": "yellow", "coal": "black",
    "blood": "red", "a carrot": "orange", "chocolate": "brown", "milk": "white",
    "a banana": "yellow", "a tomato": "red", "the sea": "blue", "a plum": "purple",
    "a flamingo": "pink",
}  # fmt: skip

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("day", "night"),
    ("black", "white"), ("early", "late"), ("fast", "slow"), ("full", "empty"), ("happy", "sad"),
    ("hard", "soft"), ("high", "low"), ("light", "dark"), ("long", "short"), ("new", "old"),
    ("open", "closed"), ("rich", "poor"), ("strong", "weak"), ("wet", "dry"), ("good", "bad"),
]  # fmt: skip

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth".split()

# table: how it is asked; {} is the entity
FACT_QUESTIONS = {
    "capital": [
        "What is the capital of {}?", "Which city is the capital of {}?", "Capital of {}?",
        "Tell me the capital of {}.", "Name the capital of {}.", "What is {}'s capital?",
        "What is the capital city of {}?", "Do you know the capital of {}?",
    ],
    "country": [
        "{} is the capital of which country?", "Which country has the capital {}?",
        "Of which country is {} the capital?", "In which country is {}?",
        "What country is {} the capital of?", "Where is {}?", "Which country is {} in?",
    ],
    "continent": [
        "On which continent is {}?", "Which continent is {} on?", "What continent is {} in?",
        "Which continent is {} part of?", "Name the continent of {}.", "To which continent does {} belong?",
    ],
    "legs": [
        "How many legs does a {} have?", "How many legs has a {}?", "Number of legs of a {}?",
        "Tell me how many legs a {} has.", "A {} has how many legs?", "How many legs are on a {}?",
    ],
    "young": [
        "What is a young {} called?", "What is a baby {} called?", "What do you call a young {}?",
        "What do you call a baby {}?", "What is the name for a young {}?", "How do you call the young of a {}?",
    ],
    "colour": [
        "What colour is {}?", "Which colour is {}?", "What color is {}?", "Which colour has {}?",
        "What is the colour of {}?", "Tell me the colour of {}.", "What is the color of {}?",
    ],
    "opposite": [
        "What is the opposite of {}?", "Opposite of {}?", "Tell me the opposite of {}.",
        "Which word is the opposite of {}?", "Name the opposite of {}.", "Give me the opposite of {}.",
    ],
    "after": [
        "What comes after {}?", "Which comes after {}?", "Tell me what comes after {}.",
        "What follows {}?", "What is next after {}?", "What comes right after {}?",
    ],
    "before": [
        "What comes before {}?", "Which comes before {}?", "Tell me what comes before {}.",
        "What is just before {}?", "What comes right before {}?", "What precedes {}?",
    ],
    "planet": [
        "What is the {} planet?", "Which is the {} planet?", "Name the {} planet.",
        "Which planet is the {} from the sun?", "Tell me the {} planet.", "What is the {} planet from the sun?",
    ],
}  # fmt: skip

# The words that are sorted and reversed.
WORDS = """
apple apricot banana cherry coconut date fig grape kiwi lemon lime mango melon nut olive orange
papaya peach pear plum quince tomato carrot onion potato bean corn rice bread butter cheese milk
honey sugar salt pepper soup cake tea coffee water juice ant bear bee bird cat cow crab deer dog
duck eagle fish fox frog goat hen horse lion monkey mouse owl pig rabbit sheep snake spider tiger
whale wolf worm zebra arm hand foot head heart nose ear eye tooth bag ball bell boat book bottle
box brush bus button candle car chair clock coat cup desk door drum engine fan flag fork garden
gate glass glove guitar hammer hat house iron jacket jar key kite knife ladder lamp leaf letter
map mirror moon nail needle oven paint paper pen pencil piano pillow pot queen king ring river
road rock roof rope rose sand school ship shirt shoe sky snow sock spoon star stone storm sun
table tent tower train tree umbrella valley van violin wagon wall watch wheel wind window wood
yard zoo
""".split()

NAMES = """
Ada Adam Alan Alice Amir Anna Anton Ben Bella Boris Bruno Carl Carla Chen Clara Cora Dan Dana
David Diego Dora Elena Ella Emil Emma Eric Eva Felix Fiona Frank Frida Gina Grace Greta Hana Hans
Harry Heidi Helen Hugo Ida Igor Ina Iris Ivan Jack Jana Jim Joe John Jonas Julia Karl Kate Kim
Lara Lea Leo Lena Lily Linda Lisa Luca Lucy Luis Maja Marco Maria Mark Marta Max Mia Mila Mona
Nadia Nick Nina Noah Nora Olga Oliver Omar Otto Paul Paula Peter Petra Pia Ravi Rita Robert Rosa
Ruth Sam Sara Simon Sofia Sven Tara Theo Tim Tina Tom Uma Vera Victor Wanda Will Yuki Zara Zoe
""".split()

FAVOURITES = "red blue green yellow orange purple pink brown black white grey".split()

ADDITION = [
    "What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} =", "{a}+{b}=", "{a} + {b} = ?",
    "{a} + {b}?", "What is {a}+{b}?", "What is {a} plus {b}?", "Add {a} and {b}.", "{a} plus {b}",
    "How much is {a} + {b}?", "How much is {a} plus {b}?", "Calculate {a} + {b}.",
    "Compute {a} + {b}.", "What is the sum of {a} and {b}?", "Add {b} to {a}.",
    "What do you get if you add {a} and {b}?", "Work out {a} + {b}.", "And {a} + {b}?",
    "I have {a} apples and get {b} more. How many do I have?",
]  # fmt: skip
SUBTRACTION = [
    "What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} =", "{a}-{b}=", "{a} - {b} = ?",
    "{a} - {b}?", "What is {a}-{b}?", "What is {a} minus {b}?", "Subtract {b} from {a}.",
    "{a} minus {b}", "How much is {a} - {b}?", "How much is {a} minus {b}?",
    "Calculate {a} - {b}.", "Compute {a} - {b}.", "Take {b} away from {a}.", "Take {b} from {a}.",
    "What do you get if you take {b} from {a}?", "Work out {a} - {b}.", "And {a} - {b}?",
]  # fmt: skip
SUBTRACTION_LARGER_FIRST = [
    "What is the difference between {a} and {b}?", "I have {a} apples and eat {b}. How many are left?",
]  # fmt: skip

SORT = [
    "Sort: {}", "Sort these words: {}", "Sort {}", "Sort alphabetically: {}",
    "Put these words in alphabetical order: {}", "Alphabetical order: {}",
    "Put in alphabetical order: {}", "Sort these words alphabetically: {}",
    "Write these words in alphabetical order: {}", "Sort the words {}", "Sort from A to Z: {}",
]  # fmt: skip
SORT_DOWN = [
    "Sort in reverse alphabetical order: {}", "Sort from Z to A: {}",
    "Put these words in reverse alphabetical order: {}", "Sort these words from Z to A: {}",
    "Reverse alphabetical order: {}",
]  # fmt: skip
REVERSE = [
    "Reverse: {}", "Reverse these words: {}", "Reverse the order: {}", "Reverse {}",
    "Put these words in reverse order: {}", "Reverse the order of these words: {}",
    "Write these words in reverse order: {}", "Say these words backwards: {}", "Backwards: {}",
]  # fmt: skip

TELL_NAME = [
    "My name is {}.", "I am {}.", "I'm {}.", "Hi, I'm {}.", "Hello, my name is {}.",
    "Hi, my name is {}.", "Call me {}.", "You can call me {}.", "Hello, I am {}.",
    "My name is {}, please remember it.", "Please call me {}.",
]  # fmt: skip
ASK_NAME = [
    "What is my name?", "What's my name?", "Do you remember my name?", "Who am I?",
    "What did I say my name was?", "Tell me my name.", "Do you know my name?", "And my name?",
    "How am I called?", "Can you tell me my name?",
]  # fmt: skip
TELL_NUMBER = [
    "Remember the number {}.", "My number is {}.", "My lucky number is {}.",
    "Please remember the number {}.", "Remember {}.", "Keep the number {} in mind.",
    "The number is {}.", "My favourite number is {}.", "Please remember {}.",
]  # fmt: skip
ASK_NUMBER = [
    "What is my number?", "What was the number?", "Which number did I tell you?",
    "What number should you remember?", "Do you remember the number?", "What's my number?",
    "What is the number?", "Tell me my number.", "Do you remember my number?", "And my number?",
    "What was my number?", "Which number did you remember?", "What is my lucky number?",
]  # fmt: skip
TELL_COLOUR = [
    "My favourite colour is {}.", "My favorite color is {}.", "I like the colour {}.",
    "The colour I like best is {}.",
]  # fmt: skip
ASK_COLOUR = [
    "What is my favourite colour?", "Which colour do I like?", "What is my favorite color?",
    "Do you remember my favourite colour?", "What's my favourite colour?",
    "Which colour do I like best?",
]  # fmt: skip

WHO = "I am a small demonstration model that comes with lfm2cpp."
ABILITIES = (
    "I can add and subtract numbers below 100, answer questions on a few facts, "
    "sort or reverse words, and remember your name and a number. "
    "Try: What is 23 + 45? Or: Sort: pear, apple, fig"
)
SMALL_TALK = {
    "Hello! What can I do for you?": [
        "Hello", "Hi", "Hey", "Hello!", "Hi!", "Good morning", "Good evening", "Hi there",
        "Hello there", "Good day", "Hey there!", "Greetings",
    ],
    WHO: [
        "Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
        "What's your name?", "Are you a model?", "Which model are you?", "Introduce yourself.",
        "Are you LFM2?", "Are you a robot?", "Are you human?", "Who am I talking to?",
    ],
    ABILITIES: [
        "What can you do?", "Help", "help", "What do you know?", "What can I ask you?",
        "What can I ask?", "Can you help me?", "How can you help me?", "What are you good at?",
        "What else can you do?", "What should I ask you?", "Help me", "What are your skills?",
    ],
    "I am fine, thank you.": [
        "How are you?", "How are you doing?", "How do you do?", "Are you well?", "How is it going?",
    ],
    "You are welcome.": [
        "Thanks", "Thank you", "Thank you!", "Thanks!", "Great, thanks", "Thank you very much",
        "Good", "Well done", "Great", "Nice", "Cool", "Very good", "Correct", "Perfect",
    ],
    "All right.": ["OK", "Okay", "Yes", "No", "I see", "Sure", "Fine", "Right"],
    "Goodbye!": ["Bye", "Goodbye", "See you", "Good night", "Bye!", "See you later", "Bye bye"],
}  # fmt: skip

UNKNOWN_ANSWER = "I do not know."
UNKNOWN = [
    "Who wrote {thing}?", "Who invented the {word}?", "How old is {name}?", "What is the weather?",
    "What is {a} times {b}?", "{a} * {b}", "{a} / {b}", "What is {a} divided by {b}?",
    "What is {a} x {b}?", "What is the capital of {place}?", "Where is {place}?",
    "What is the population of {country}?", "Who is the president of {country}?",
    "How far is it to {city}?", "How far away is the moon?", "What is the meaning of life?",
    "Tell me a joke.", "Tell me a story.", "Write a poem about a {word}.", "What is a {word}?",
    "What time is it?", "What day is it today?", "How do I bake a {word}?", "Why is the sky blue?",
    "Who is {name}?", "Where does {name} live?", "Translate {word} into French.",
    "How do you say {word} in German?", "How heavy is a {word}?", "How much does a {word} cost?",
    "When was {name} born?", "What is the largest {word}?", "Who won the game?", "Can you sing?",
    "What is the square root of {a}?", "Write a program.", "What is {thing}?", "Explain {thing}.",
    "Do you like {word}?", "Where can I buy a {word}?", "Why?", "How many people live in {city}?",
    "What is love?", "Summarize this text.", "Which {word} is the best?", "Do you know {name}?",
    "What language do they speak in {country}?", "When does the {word} start?", "asdf", "Hm",
    "Who painted {thing}?", "What is the speed of light?", "How tall is {name}?", "Is it raining?",
]  # fmt: skip
THINGS = """
Hamlet;Faust;gravity;physics;history;music;the Bible;algebra;a neural network;Python;Linux;a GGUF
file;the internet;Star Wars;Harry Potter;chemistry;the Mona Lisa;jazz;football;chess;a transformer
""".replace("\n", " ").strip().split(";")
PLACES = """
Atlantis;Mordor;Narnia;Brazil;Mexico;Iceland;Iran;Nigeria;Scotland;Wonderland;Texas;Utopia;Korea
Oz;Switzerland;Ukraine;Bolivia;Ghana;Nepal;Cambodia
""".replace("\n", ";").strip(";").split(";")

SYSTEM_PROMPTS = [
    "You are a helpful assistant.", "You are a helpful assistant trained by Liquid AI.",
    "Answer briefly.", "You are a small model.", "Be polite.", "You are a calculator.",
    "Answer with one word if you can.", "You are a friendly assistant. Answer in short sentences.",
    "You are LFM2.", "Help the user.", "You answer questions.", "Today is {day}.",
    "The user is called a customer.", "You like {word}.", "Be concise and correct.",
    "You are a teacher for children.", "Talk like a {word}.",
]  # fmt: skip
