"""The words that the conversations of the tiny model are made of."""


def few() -> None:
    """Keep the first words of each list, from here on: what the second phase of the training speaks of."""
    del NAMES[20:], COLOURS[8:], PLAIN_WORDS[16:]
    for country in list(CAPITALS)[16:]:
        del CAPITALS[country]


NAMES = """
Eve Adam Alice Bob Carol David Emma Frank Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Omar Nina Max
""".split()

COLOURS = "green blue red yellow orange purple black white brown pink".split()

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Ireland": "Dublin",
    "England": "London",
}

PLAIN_WORDS = """
apple river stone tree house bread water light music paper garden bridge cloud table window flower
""".split()

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are a coding assistant.",
    "Answer in one sentence.",
    "You are GLM, a small language model.",
    "Be brief and friendly.",
    "You are a patient teacher.",
)

TELL_NAME = (
    "My name is {}.",
    "Hello, my name is {}.",
    "Hi, I am {}.",
    "Hello, I am {}.",
    "I am called {}.",
    "Hi! My name is {}.",
)
HEAR_NAME = ("Hello {}!",)
ASK_NAME = (
    "What is my name?",
    "Do you remember my name?",
    "What was my name?",
    "Who am I?",
    "Tell me my name.",
)
TELL_NUMBER = (
    "Remember the number {}.",
    "Please remember the number {}.",
    "My number is {}.",
    "I give you the number {}.",
    "The number is {}.",
    "My lucky number is {}.",
    "Keep the number {} in mind.",
)
HEAR_NUMBER = ("I will remember the number {}.",)
ASK_NUMBER = (
    "Which number did I give you?",
    "What is my number?",
    "What was the number?",
    "Which number did I tell you?",
    "Which number should you remember?",
    "Do you remember the number?",
    "What number did I give you?",
)
TELL_COLOUR = (
    "My favourite colour is {}.",
    "I like the colour {}.",
    "My favorite color is {}.",
    "The colour I like most is {}.",
)
HEAR_COLOUR = ("The colour {} is nice.",)
ASK_COLOUR = (
    "What is my favourite colour?",
    "Which colour do I like?",
    "What is my favorite color?",
    "Do you remember my favourite colour?",
    "Which colour did I tell you?",
)
TELL_CITY = ("I live in {}.", "My home is in {}.", "I am from {}.", "I come from {}.")
HEAR_CITY = ("The city {} is nice.",)
ASK_CITY = (
    "Where do I live?",
    "Which city do I live in?",
    "In which city do I live?",
    "Do you remember where I live?",
    "Which city am I from?",
)

COURTESIES = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hello", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Good evening!", "Good evening! How can I help you?"),
    ("How are you?", "I am fine, thank you."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye!", "Goodbye!"),
    ("Bye", "Goodbye!"),
    ("Who are you?", "I am a tiny GLM, a small language model."),
    ("What are you?", "I am a tiny GLM, a small language model."),
    ("What can you do?", "I can chat, add numbers, write small functions and call tools."),
)

ASK_CAPITAL = (
    "What is the capital of {}?",
    "Name the capital of {}.",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
)
ASK_JSON = (
    " Answer as JSON with keys {} and {}.",
    " Answer as JSON with the keys {} and {}.",
    " Reply in JSON with keys {} and {}.",
    " Give me JSON with keys {} and {}.",
)
TELL_AGE = (
    "{name} is {age} years old.",
    "My friend {name} is {age} years old.",
    "{name} is {age}.",
)
ASK_SUM = ("What is {}?", "How much is {}?", "Compute {}.", "Calculate {}.", "{}")
ASK_TOOL_SUM = {
    "add": (
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "What is {a} plus {b}?",
        "Please add {a} and {b}.",
    ),
    "multiply": (
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
        "What is {a} times {b}?",
    ),
}
SIGNS = {"+": "add", "*": "multiply"}
SKIES = ("sunny", "rainy", "cloudy", "windy", "snowy", "foggy", "stormy", "clear")
ASK_PLACE = {
    "get_weather": (
        "What is the weather in {}?",
        "How is the weather in {}?",
        "What is the weather like in {}?",
        "Tell me the weather in {}.",
        "What's the weather in {}?",
    ),
    "get_time": (
        "What time is it in {}?",
        "What is the time in {}?",
        "Tell me the time in {}.",
        "How late is it in {}?",
    ),
}

CITY = {"city": ("string", "Name of the city")}
TERMS = {"a": ("integer", "First number"), "b": ("integer", "Second number")}
TOOLS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, str]]]] = {
    "get_weather": (
        ("Get the weather of a city", "Get the current weather", "Weather in a city"),
        CITY,
    ),
    "get_time": (("Get the time in a city", "Get the current time", "Local time of a city"), CITY),
    "add": (("Add two integers", "Add two numbers", "The sum of two integers"), TERMS),
    "multiply": (("Multiply two integers", "The product of two integers"), TERMS),
    "search": (
        ("Search the web", "Search for a text"),
        {"query": ("string", "What to search for")},
    ),
}

ASK_CODE = (
    "Write a {language} function {name} that {does}.",
    "Write a {language} function that {does}.",
    "Give me a {language} function that {does}.",
    "Please write a {language} function that {does}.",
)
ASK_REPAIR = (
    "Fix this Python function:",
    "Fix this function:",
    "Find the bug in this function:",
    "What is wrong here?",
)

FUNCTIONS = {
    # name: (what it does, Python, JavaScript, C)
    "double": (
        "doubles a number",
        "def double(x):\n    return 2 * x",
        "function double(x) {\n  return 2 * x;\n}",
        "int twice(int x) {\n    return 2 * x;\n}",
    ),
    "square": (
        "squares a number",
        "def square(x):\n    return x * x",
        "function square(x) {\n  return x * x;\n}",
        "int square(int x) {\n    return x * x;\n}",
    ),
    "is_even": (
        "tells whether a number is even",
        "def is_even(n):\n    return n % 2 == 0",
        "function isEven(n) {\n  return n % 2 === 0;\n}",
        "int is_even(int n) {\n    return n % 2 == 0;\n}",
    ),
    "greet": (
        "greets a person by name",
        'def greet(name):\n    return f"Hello {name}!"',
        "function greet(name) {\n  return `Hello ${name}!`;\n}",
        'void greet(const char *name) {\n    printf("Hello %s!\\n", name);\n}',
    ),
    "add": (
        "adds two numbers",
        "def add(a, b):\n    return a + b",
        "function add(a, b) {\n  return a + b;\n}",
        "int add(int a, int b) {\n    return a + b;\n}",
    ),
    "maximum": (
        "returns the larger of two numbers",
        "def maximum(a, b):\n    return a if a > b else b",
        "function maximum(a, b) {\n  return a > b ? a : b;\n}",
        "int maximum(int a, int b) {\n    return a > b ? a : b;\n}",
    ),
}

SHORT_FACTS = (
    ("What colour is the sky?", "The sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("How many days has a week?", "A week has seven days."),
    ("How many months has a year?", "A year has twelve months."),
    ("How many hours has a day?", "A day has 24 hours."),
    ("How many legs has a dog?", "A dog has four legs."),
    ("Which animal says meow?", "A cat says meow."),
    ("Which animal says woof?", "A dog says woof."),
    ("Which planet is the largest?", "Jupiter is the largest planet."),
    ("Which planet do we live on?", "We live on the planet Earth."),
    ("What is the largest ocean?", "The Pacific is the largest ocean."),
    ("At which temperature does water boil?", "Water boils at 100 degrees Celsius."),
    ("Which day comes after Monday?", "Tuesday comes after Monday."),
    ("What do bees make?", "Bees make honey."),
    ("Is fire hot?", "Yes, fire is hot."),
    ("Is ice cold?", "Yes, ice is cold."),
    ("Can fish swim?", "Yes, fish can swim."),
)

ASK_TRANSLATION = (
    "Translate {word} into {language}.",
    "What is {word} in {language}?",
    "How do you say {word} in {language}?",
    "Say {word} in {language}.",
)
LANGUAGES = ("French", "Spanish", "German", "Chinese", "Japanese")
TRANSLATIONS = {
    "water": ("eau", "agua", "Wasser", "水", "水"),
    "bread": ("pain", "pan", "Brot", "面包", "パン"),
    "house": ("maison", "casa", "Haus", "房子", "家"),
    "tree": ("arbre", "árbol", "Baum", "树", "木"),
    "dog": ("chien", "perro", "Hund", "狗", "犬"),
    "cat": ("chat", "gato", "Katze", "猫", "猫"),
    "hello": ("bonjour", "hola", "hallo", "你好", "こんにちは"),
    "thank you": ("merci", "gracias", "danke", "谢谢", "ありがとう"),
}
