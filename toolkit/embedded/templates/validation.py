"""The validation split's situations, small talk and names: none of it occurs in train or test."""

NAMES = ["Alice", "Bruno", "Cecilia", "Dennis", "Elena", "Felix", "Gloria", "Hugo", "Isabel", "Jonas", "Klara", "Lukas"]

CITIES = ["Athens", "Geneva", "Houston", "Naples", "Bergen", "Porto"]

OPENINGS = """
X: Hello there, {Y}.
X: Morning, {Y}. Did you sleep well?  >>  Y: Yes, like a stone.
X: Welcome. What brings you here?
X: Hello, {X} here.  >>  Y: Hello. I am glad that you are calling.
X: Sorry to disturb you.  >>  Y: You are not disturbing me at all.
X: {Y}! What a surprise.  >>  Y: I was just thinking of you.
"""

SMALL_TALK = """
X: The flowers on your desk are beautiful.  >>  Y: They are from my garden.
X: It is getting dark early now.  >>  Y: Yes, winter is coming.
X: Is that a new coat?  >>  Y: No, I have had it for years.
"""

CORRECTIONS = """
X: I made a mistake. It is not {old}, it is {new}.  >>  Y: Thanks for telling me.
X: Hold on, I mixed that up. {New} is right, not {old}.  >>  Y: I see.
"""

CLOSINGS = """
X: That helps me a lot.  >>  Y: I am happy to hear that.
X: Good. Until then.
X: Wonderful. Take care.  >>  Y: You too.
"""

TEMPLATES = """
# meeting
thing = the summer campaign / the office move / the safety rules
A: We have to talk about {thing}. Do you have time on {day~}? | I want to discuss {thing} with you on {day~}.
B: Yes, but {n} should be there too. | Only if {n} can join us.
~day
A: I agree. I will book a room for {time}. | Sure. Let us start at {time}.
=> {A} wants to discuss {thing} with {B} and {n} on {day} at {time}.
=> {A} and {B} will talk about {thing} on {day}, and {n} will join them.

# travel
A: I missed the last ferry to {city~}. | The ferry to {city~} left without me.
B: The next one goes on {day}. You could stay with {n}. | There is no other before {day}. {N} has a bed for you.
~city
A: That would be kind. How much is a new ticket? | Thanks. And what is a new ticket?
B: A new ticket costs {price}. | They ask {price} for it.
=> {A} missed the ferry to {city}. The next one goes on {day}, and {A} can stay with {n}.
=> {A} needs a new ticket to {city} for {price} and will stay with {n}.

# shopping
thing = laptop / tablet / keyboard
A: This {thing} is nice, but {price~} is too expensive for me. | I like the {thing}, but I cannot spend {price~}.
B: We have a used one in {color}. | There is a used one. It is {color}.
~price
A: Does it have a guarantee? | And the guarantee?
B: Yes, for {count2} years. | You get one for {count2} years.
=> {A} thinks the {thing} for {price} is too expensive. {B} offers a used {color} one.
=> {B} has a used {color} {thing} with a guarantee for {count2} years.

# health
A: I need to see the dentist. My tooth has hurt since {day~}. | My tooth has hurt since {day~}, so I need the dentist.
B: The dentist is on holiday until {day2}. | I am afraid the dentist is away until {day2}.
~day
A: I cannot wait so long. | But it hurts too much.
B: Then you can go to {n} near the {place}. | {N} also has a practice, near the {place}.
=> {A}'s tooth has hurt since {day}. The dentist is away, so {B} sends {A} to {n} near the {place}.
=> {A} cannot wait until {day2} for the dentist and will go to {n}.

# school
instrument = violin / flute / trumpet
A: I would like to learn the {instrument}. Is there a class on {day~}? | Do you teach the {instrument} on {day~}?
B: There is one, and {n} teaches it. | Yes, our teacher is {n}.
~day
A: And how much is a lesson? | What do you charge for a lesson?
B: {Price}. You have to buy your own {instrument}. | It is {price}, but you must bring your own {instrument}.
=> {A} wants to learn the {instrument} on {day}. {B} says that a lesson with {n} costs {price}.
=> {n} teaches the {instrument} for {price} a lesson, but {A} has to bring one.

# lost
thing = laundry / key / scarf
A: I think I forgot my {thing} in the gym on {day~}. | Was my {thing} found in the gym on {day~}?
B: We keep lost things at the {place}. | Everything that we find goes to the {place}.
~day
A: When is somebody there? | How long are they open?
B: Until {time}. Ask for {n}. | {N} is there until {time}.
=> {A} forgot a {thing} in the gym on {day}. {B} tells {A} to ask {n} at the {place}.
=> {A} can look for the {thing} at the {place} until {time}.

# home
A: I want to paint the kitchen {color~}. Can you help me on {day}? | Could you help me to paint the kitchen {color~} on {day}?
B: Gladly, but who will buy the paint? | Of course. Do we have enough paint?
~color
A: {N} will get it for {price}. | {N} buys it. It is only {price}.
=> {A} wants to paint the kitchen {color} on {day} with {B}'s help. {n} will buy the paint.
=> {B} will help {A} to paint the kitchen, and {n} gets the paint for {price}.

# car
A: I would like to rent a car in {city~} from {day}. | Is there a car for rent in {city~} on {day}?
B: Only a small {color} one is left. | I have just one, small and {color}.
~city
A: That will do. And the price? | Small is fine. What do I pay?
B: {Price} a day, without petrol. | It is {price} a day, and petrol is extra.
=> {A} wants to rent a car in {city} from {day}. {B} has a small {color} one for {price} a day.
=> {A} rents a small {color} car for {price} a day.
"""
