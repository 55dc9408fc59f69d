"""The test split's situations, small talk and names: none of it occurs in train or validation, and nothing is tuned on it."""

NAMES = [
    "Agnes",
    "Boris",
    "Camille",
    "Dora",
    "Edgar",
    "Flora",
    "Gustav",
    "Harriet",
    "Ingrid",
    "Jasper",
    "Lena",
    "Martin",
    "Nadia",
    "Otto",
    "Ruth",
    "Stefan",
]

CITIES = ["Zurich", "Brussels", "Miami", "Helsinki", "Valencia", "Glasgow", "Turin", "Montreal"]

OPENINGS = """
X: Ah, {Y}, there you are.
X: Good day, {Y}. How is the family?  >>  Y: Everybody is well, thank you.
X: Please take a seat.  >>  Y: Thank you. It took me an hour to get here.
X: Yes? Who is there?
X: {X} on the line. Am I too late?  >>  Y: Not at all. We are still open.
X: Long time no see, {Y}!  >>  Y: True. I was very busy this spring.
X: Are you free for a moment, {Y}?  >>  Y: For you, always.
"""

SMALL_TALK = """
X: The elevator is out of order again.  >>  Y: The stairs keep us healthy.
X: I smell fresh bread.  >>  Y: There is a bakery downstairs.
X: My phone keeps ringing today.  >>  Y: Just let it ring.
X: What a lovely picture on the wall!  >>  Y: My daughter painted it.
"""

CORRECTIONS = """
X: Let me correct myself: {new} instead of {old}.  >>  Y: Understood.
X: Hmm, {old} will not do after all. Can we take {new}?  >>  Y: Sure, {new} it is.
"""

CLOSINGS = """
X: You saved my day.  >>  Y: Any time.
X: Then everything is clear. Bye.
X: I am grateful.  >>  Y: Do not mention it.
"""

TEMPLATES = """
# meeting
thing = the annual report / the new logo / the price list
A: The client wants to hear about {thing} on {day~}. Can you go? | Could you explain {thing} to the client on {day~}?
B: I have never done that alone. | Alone? I am not sure.
~day
A: {N} can go with you. | Take {n} with you, then.
B: In that case I will do it at {time}. | With {n} it is fine. We will start at {time}.
=> {A} asks {B} to explain {thing} to the client on {day}. {B} will do it with {n}.
=> {B} and {n} will talk to the client about {thing} on {day} at {time}.

# travel
A: My passport expires on {day~}, and I have to go to {city}. | I must travel to {city}, but my passport expires on {day~}.
B: A new one takes {count2} weeks. | You wait {count2} weeks for a new one.
~day
A: Is there a faster way? | Can it be done sooner?
B: You can have a temporary one for {price}. | For {price} you get a temporary one.
=> {A} has to go to {city}, but the passport expires on {day}. {B} offers a temporary one for {price}.
=> A new passport takes {count2} weeks, so {A} can get a temporary one for {price}.

# travel
thing = tent / sleeping bag / rain jacket
A: {N} and I are going hiking near {city~}. Can I borrow your {thing}? | Would you lend me your {thing}? I go hiking near {city~} with {n}.
B: You can have it, but I need it back on {day}. | Yes, if you return it on {day}.
~city
A: I promise. I will also wash it. | Sure. You will get it back clean.
=> {A} wants to borrow {B}'s {thing} to go hiking near {city} with {n}.
=> {B} lends {A} a {thing} and needs it back on {day}.

# shopping
flower = roses / tulips / lilies
A: I want to order {color~} {flower} for a wedding. | For a wedding I need {flower}, {color~} if possible.
B: How many do you need, and when? | When is the wedding?
~color
A: It is on {day} in the {place}. | They marry in the {place} on {day}.
B: We can bring them at {time} for {price}. | Good. That makes {price}, and we come at {time}.
=> {A} orders {color} {flower} for a wedding on {day}. {B} will bring them to the {place} at {time}.
=> {B} will bring {flower} to a wedding in the {place} for {price}.

# restaurant
food = nuts / milk / garlic
A: {N} cannot eat {food}. What do you recommend? | Is there something without {food} for {n}?
B: The {color} curry is made without {food}. | You could order the {color} curry.
A: Good. How long do we have to wait? | We take it. Will it take long?
B: It will be ready at {time} and costs {price}. | It costs {price}. You can have it at {time}.
=> {A} looks for a meal without {food} for {n}. {B} recommends the {color} curry for {price}.
=> {n} cannot eat {food}, so {A} orders the {color} curry, which is ready at {time}.

# health
A: I need new glasses. I cannot read the signs at the {place}. | I cannot read the signs at the {place} any more. Do I need glasses?
B: I will test your eyes on {day~}. | Let us test your eyes on {day~}.
~day
A: Should I bring anything? | Do I have to prepare something?
B: Bring {price} and do not drive a car. | Do not come by car. The test is {price}.
=> {A} cannot read the signs at the {place}. {B} will test {A}'s eyes on {day} for {price}.
=> {B} will test {A}'s eyes on {day} and tells {A} not to drive.

# school
language = Italian / Japanese / Greek
A: I want to join the {language} course that starts on {day~}. | Can I still join the {language} course on {day~}?
B: It is full, but {n} may give up a place. | There is no place left, unless {n} drops out.
~day
A: When will you know? | How will I find out?
B: I will call you at {time}. | Wait for my call at {time}.
=> {A} wants to join the {language} course on {day}, but it is full. {B} will call at {time}.
=> {A} can only join the {language} course if {n} gives up a place.

# work
A: I have been offered a post in {city~}, and I do not know what to do. | They offered me a post in {city~}. Should I accept it?
B: Do they pay more? | What about the salary?
~city
A: Yes, {price} more a week, but {n} does not want to move. | It is {price} more a week, but {n} would have to stay here.
B: Talk to {n} and decide on {day}. | Do not decide before {day}, and talk to {n}.
=> {A} was offered a post in {city}, but {n} does not want to move. {B} advises {A} to decide on {day}.
=> {B} tells {A} to talk to {n} about the post in {city}.

# home
animal = fish / hamster / canary
A: I am away until {day~}. Could you feed my {animal}? | Would you feed my {animal} until {day~}?
B: Yes. Where do I find the food? | Sure, but where is the food?
~day
A: In the {color} box. {N} has the key. | Ask {n} for the key. The food is in the {color} box.
=> {A} asks {B} to feed the {animal} until {day}. The food is in the {color} box and {n} has the key.
=> {B} will feed {A}'s {animal} and get the key from {n}.

# bank
thing = card / purse / phone
A: Somebody stole my {thing} at the {place}. | My {thing} was stolen at the {place}.
B: When did that happen? | Do you remember the time?
A: At {time~}, when I was with {n}. | It was at {time~}. {N} was with me.
B: I will block it. A new one comes on {day}. | We block it at once and send a new one on {day}.
~time
=> {A}'s {thing} was stolen at the {place} at {time}. {B} will block it and send a new one on {day}.
=> {B} will block {A}'s stolen {thing} and send a new one on {day}.

# car
A: Officer, why did you stop me? | Good evening, officer. Did I do something wrong?
B: You parked at the {place}, next to the {color} sign. | The {color} sign at the {place} means no parking.
A: I did not see it. I was helping {n}. | I am sorry. I had to fetch {n}.
B: You have to pay {price} before {day}. | I understand, but it is {price}, until {day}.
=> {A} parked next to the {color} sign at the {place} and has to pay {price} before {day}.
=> {B} gives {A} a fine of {price} for parking at the {place}.

# party
dish = noodles / dumplings / pancakes
A: Will you teach me to cook {dish}? {N} is coming on {day~}. | {N} is coming on {day~}, and I want to cook {dish}. Can you show me?
B: With pleasure. I will come at {time}. | Yes. Shall I come at {time}?
~day
A: Great. What should I buy? | Thanks. Do I need anything?
B: Only flour and {color} pepper. | Get some flour and {color} pepper.
=> {A} wants to cook {dish} for {n} on {day}. {B} will come at {time} to teach {A}.
=> {B} will teach {A} to cook {dish}, and {A} should buy flour and {color} pepper.
"""
