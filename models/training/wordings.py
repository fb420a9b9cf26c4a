"""Word lists of the corpus: the frames of questions, fillers, synonyms, and topics that are not ours. Data only."""

NOUN_FRAMES = """
what is {}|what is {}|what is {}|what's {}|whats {}|what are {}|{}|{}|{}|{}|{}|{}|{}|{}|explain {}|explain {}|explain {}|tell me about {}|describe {}|define {}
what does {} mean|what does {} do|what do you know about {}|can you explain {}|could you explain {}|i want to know about {}
i do not understand {}|help me understand {}|what is meant by {}|{} meaning|{} explained|definition of {}|what is the purpose of {}
why {}|why is there {}|why do we need {}|why do i need {}|how does {} work|how do {} work|give me info on {}|information about {}
what is {} for|what is {} used for|what is {} good for|when do i use {}|how do i use {}|how is {} used|what is the point of {}
something about {}|talk about {}|info on {}|more on {}|a question about {}|eli5 {}|could you tell me what {} is
do you know what {} is|i have never heard of {}|please explain what {} is|what exactly is {}|what the heck is {}
what on earth is {}|i keep reading about {}|the docs mention {}, what is that|{} - what is that|what's the deal with {}
i saw {} in the readme, what is it|give me a short explanation of {}|teach me {}|in a nutshell, what is {}|what is the idea of {}
what is the role of {}|what is the meaning of {}|how would you describe {}|how would you explain {}|summarize {}|basics of {}
what should i know about {}|who needs {}|where is {} used|what does the term {} mean|what does {} stand for|introduction to {}
what kind of thing is {}|what can {} do|i wonder what {} is|why does ktransformers have {}|what do you mean by {}|and {}|what about {}
how about {}|so what is {} then|say something about {}|got any info about {}|what's {} all about|is {} important|i need help with {}
{}, what is it|{}, what are they|{} - what are these|please tell me what {} are|tell me what {} is|{}, what does it do|so {}, what's that|and what are {} then
i keep hearing about {}, explain|can you describe {}|please define {}|what do people mean by {}|i am confused about {}|{} in two sentences
what is {} supposed to be|what does {} consist of|what is {} made of|what is {} doing|{}, whats it for|can you explain to me what {} is|what's the benefit of {}
""".strip().replace("\n", "|").split("|")

VERB_FRAMES = """
how do i {}|how do i {}|how do i {}|how do i {}|how can i {}|how can i {}|how to {}|how to {}|how would i {}|i want to {}|i need to {}|i would like to {}
is it possible to {}|can i {}|can you {}|show me how to {}|what is the way to {}|what do i do to {}|explain how to {}|tell me how to {}
is there a way to {}|help me {}|what is the best way to {}|steps to {}|{}|could you show me how to {}|how should i {}|where do i {}
i am trying to {}|what do i need to {}|how does one {}|how do you {}|how could i {}|what must i do to {}|what is needed to {}
what is the right way to {}|what is the easiest way to {}|i don't know how to {}|is it hard to {}|what is the command to {}|i request to {}
what if i want to {}|suppose i want to {}|can someone {}|am i able to {}|how do people {}|teach me to {}|guide me to {}|instructions to {}
what steps are needed to {}|how would i go about it if i want to {}|i need to {}, how|what is the trick to {}|which setting do i need to {}|any idea how to {}
how do i manage to {}|give me a way to {}|i'd like to {}|got to {}, how do i do that|what should i do to {}|i want to {}, how do i do that
""".strip().replace("\n", "|").split("|")

FILLERS_BEFORE = """
hi,|hello,|hey,|hello!|please|can you tell me|could you tell me|in ktransformers,|so|ok,|quick question:|i was wondering,|i am new here,
excuse me,|just curious,|tell me,|sorry,|one more thing:|and|also,|btw|by the way,|i have a question:|for my project,|well,|hmm,
next question:|now|do you know|i would like to know|please tell me|ok so|good morning,|in this framework,|one question,|dear model,
my boss asks:|a friend asked me|stupid question, but|thanks.|great,|ok thanks, and|i read the readme but|explain to me|i forgot,
""".strip().replace("\n", "|").split("|")

FILLERS_AFTER = """
please|in ktransformers|here|exactly|in simple words|briefly|thanks|for a beginner|in this framework|in short|in detail|again
actually|then|for me|in one sentence|quickly|in this project|in general|for dummies|if i may ask|in plain english|today|, thanks|, please
""".strip().replace("\n", "|").split("|")

SYNONYMS = {
    "what is": ["what's", "whats", "what exactly is", "wat is"],
    "do not": ["don't", "dont"],
    "i am": ["i'm", "im"],
    "explain": ["describe", "clarify", "outline", "illustrate"],
    "difference": ["distinction", "differences"],
    "gpus": ["graphics cards", "video cards", "cards", "GPUs"],
    "gpu": ["graphics card", "video card", "GPU", "gpu card"],
    "cpu": ["processor", "CPU"],
    "moe": ["MoE", "MOE"],
    "yaml": ["YAML", "yml"],
    "ktransformers": ["KTransformers", "kt", "KTransformer"],
    "modules": ["layers", "submodules"],
    "module": ["layer", "submodule"],
    "weights": ["parameters", "tensors"],
    "choose": ["pick", "select", "decide on"],
    "select": ["pick", "choose", "address"],
    "use": ["utilize", "employ", "work with"],
    "used": ["utilized", "employed", "applied"],
    "run": ["execute", "launch"],
    "start": ["launch", "begin"],
    "write": ["create", "make", "author", "build"],
    "make": ["create", "build", "produce"],
    "create": ["make", "write"],
    "add": ["introduce", "include", "integrate"],
    "show": ["display", "print"],
    "load": ["open", "read"],
    "stop": ["halt", "end", "cancel"],
    "fast": ["quick", "speedy", "rapid"],
    "slow": ["sluggish", "so slow"],
    "big": ["large", "huge"],
    "why": ["how come", "for what reason", "why exactly"],
    "how do i": ["how can i", "how might i", "how does one", "how do we", "how 2"],
    "do i need": ["must i have", "do i really need", "need i"],
    "supported": ["usable", "handled", "compatible"],
    "several": ["multiple", "many"],
    "happens": ["occurs", "goes on"],
    "work": ["function", "operate"],
    "which": ["what"],
    "can i": ["could i", "may i", "am i able to"],
    "does it": ["does ktransformers", "does this"],
    "file": ["file", "document"],
    "put": ["place", "move"],
    "set": ["specify", "configure", "define"],
    "matches": ["hits", "catches", "finds"],
    "computed": ["calculated", "processed"],
    "stored": ["saved", "kept"],
    "purpose": ["goal", "aim", "point"],
    "where": ["where", "in which place"],
    "tell": ["inform", "tell"],
    "about": ["regarding", "on"],
    "memory": ["mem", "memory"],
    "model": ["llm", "network", "model"],
}

FUNCTION_WORDS = set("""
a an the is are do does did i me my to of in on for and or it its it's this that what what's whats which who how why when where can could would
should will you your please tell about be with as at by from there have has if so we use used mean know give one some any
""".split())

SYSTEM_PROMPTS = ["You are a helpful assistant.", "Answer questions about KTransformers.", "You are the KTransformers guide.",
                  "Be short and correct."]

OTHER_TOPICS = """
paris|france|london|germany|china|japan|india|italy|the moon|the sun|mars|the universe|black holes|gravity|photosynthesis|dna|the brain|cancer
the heart|pizza|pasta|bread|soup|chocolate|coffee|tea|beer|wine|cheese|a banana|an apple|football|soccer|tennis|chess|basketball|the olympics|music
jazz|the piano|a guitar|the beatles|mozart|shakespeare|hamlet|harry potter|star wars|a movie|netflix|youtube|facebook|twitter|instagram|tiktok|google
amazon|apple|microsoft|tesla|elon musk|the president|the king|napoleon|caesar|einstein|newton|darwin|the french revolution|world war two|the romans
the pyramids|the eiffel tower|mount everest|the ocean|a river|the weather|rain|snow|climate change|an earthquake|a volcano|dogs|cats|horses|dinosaurs
a shark|bees|trees|roses|a garden|money|bitcoin|the stock market|taxes|inflation|a mortgage|insurance|the economy|politics|democracy|religion|love
happiness|sleep|dreams|yoga|a diet|vitamins|the flu|headaches|a bicycle|a car|a train|an airplane|the subway|a hotel|travel|vacation|the beach
algebra|calculus|geometry|pi|prime numbers|the pythagorean theorem|statistics|javascript|java|rust|html|css|php|sql|excel|word|powerpoint|windows|macos
linux|ubuntu|docker|kubernetes|git|a database|a website|an iphone|android|wifi|bluetooth|a printer|a keyboard|minecraft|fortnite|pokemon|mario
poetry|a poem|a joke|a story|a novel|a recipe|the news|philosophy|kant|plato|art|picasso|painting|photography|fashion|shoes|a haircut|a wedding|birthdays
christmas|easter|school|university|homework|an exam|a job|an interview|a resume|my boss|my girlfriend|my mother|my dog|children|family|friendship|time
yesterday|tomorrow|life|death|god|magic|aliens|ghosts|zombies|the meaning of life|quantum physics|electricity|a laser|nuclear power|oil|gold|diamonds
chatgpt|claude|gemini|siri|midjourney|stable diffusion|blockchain|robots|a drone|self driving cars|virtual reality|tensorflow|opencv|scipy|pandas
convolutional networks|image recognition|speech recognition|reinforcement learning|a decision tree|a random forest|k-means|gan|diffusion models
""".strip().replace("\n", "|").split("|")

# Questions of fact, which never ask "what is ...": their first words alone must not sound like ours.
OTHER_FRAMES = """
who wrote {}|who invented {}|who discovered {}|who is {}|who was {}|who won {}|who makes {}|who owns {}|when was {} born|when did {} start|when was {} built
when did {} end|when is {}|how old is {}|how tall is {}|how far is {}|how many people like {}|how many {} are there|how much does {} cost|how long is {}
how heavy is {}|where is {}|where was {} born|where can i buy {}|capital of {}|what is the capital of {}|who is the president of {}|who rules {}|population of {}
what is the population of {}|what happened to {}|what color is {}|what is the price of {}|is {} healthy|is {} dangerous|do you like {}|what do you think about {}
tell me a joke about {}|write me a song about {}|recommend {}|which {} is the best|what is the history of {}|why is {} so popular|is it true that {} is dead
what is the weather in {}|what time is it in {}|how do you say {} in spanish|translate {} into french|what rhymes with {}|what year was {}|fun facts about {}
""".strip().replace("\n", "|").split("|")

OTHER_QUESTIONS = """
what happened in 1492|what happened in 1789|who won the world cup in 2010|what is 2 + 2|what is 17 times 23|what is the square root of 16|how many continents are there
how many legs has a spider|how many days are in a leap year|what is the tallest building in the world|which is the longest river|who painted the mona lisa
what is the speed of light|how far away is the nearest star|what should i have for dinner|what should i wear today|will it rain this afternoon|what day is it today
what time is it|tell me a secret|do you believe in love|are you alive|do you have feelings|what is your favourite colour|sing for me|i am bored
i am sad today|i love you|i hate mondays|my cat is ill|my back hurts|i broke my leg|who will win the election|is the earth flat|why is the sky blue|why is grass green
why do cats purr|how do planes fly|how do magnets work|how are babies made|what is for lunch|give me a recipe for lasagna|what movie should i watch|what are the lottery numbers
who is the richest person alive|who is the chancellor of germany|name the prime minister of japan|who was the first man on the moon|when did the war end
what language do they speak in brazil|what is the currency of sweden|how hot is the sun|how deep is the sea|how old is the universe|name three fruits|count to ten
write a haiku|what does my name mean|is there life on other worlds|what is the best phone|should i buy a dog|can pigs fly|do fish sleep|spell necessary
""".strip().replace("\n", "|").split("|")

OTHER_TASKS = """
cook pasta|bake a cake|make coffee|fix my car|ride a bike|learn spanish|learn to swim|play the guitar|win at chess|lose weight|find a job|write a resume
write a poem|write an essay|tell a joke|sing a song|get rich|buy a house|sell my car|invest money|pay taxes|book a flight|travel to japan|find a hotel
get a girlfriend|sleep better|stop smoking|train for a marathon|build a house|paint a wall|repair a bike|grow tomatoes|plant a tree|train my dog
feed a cat|solve an equation|do my homework|calculate a derivative|translate this to german|translate hello to french|write an email|write a letter
make a website|sort a list in python|reverse a string|hack a website|crack a password|connect to wifi|reset my iphone|install windows|use photoshop
draw a horse|take a photo|watch a movie|order a pizza|boil an egg|make money fast|become president|fly to the moon|cure a cold|get to paris
write a story|plan a party|tie a tie|remove a stain|clean the kitchen|open a bank account|print a document|send a fax|make friends|be happy
write a sorting algorithm in java|center a div|merge branches in git|undo a commit|create a database|write a react app|predict the weather
""".strip().replace("\n", "|").split("|")

COMMON_WORDS = """
really just maybe still only even also already often never always much more less here there now then today new old good bad nice simple hard easy quick
real whole own other same different first last next little big small long short right wrong sure possible necessary useful important special certain
thing things people person friend user someone everybody way kind sort part place case point problem reason idea example question answer word name
number time day week year moment work project program computer machine pc laptop home office team company repo code page text line list stuff
say said tell told ask asked think thought know knew find found see saw look want wanted need needed get got give gave take took make made put set
keep let try tried seem hear heard read understand learn learned happen change become begin end turn call feel leave bring show move hold
basically actually probably suddenly finally usually simply exactly together alone everything anything nothing something because while after before
during without within between against through instead although however therefore
""".split()

ASIDES = """
i just found this repo.|i read about it yesterday.|a colleague told me about this.|i am a student.|i got a new pc.|i am a bit lost here.|this is all new to me.
i saw it in a video.|i have looked everywhere.|nobody could tell me.|the internet says different things.|i tried a lot already.|sorry for asking.|i have no idea about this.
""".strip().replace("\n", "|").split("|")
