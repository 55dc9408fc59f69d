"""The train split's situations, small talk and names: `toolkit.embedded.dialogues` explains the notation."""

NAMES = [
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Irene",
    "Jack",
    "Karen",
    "Leo",
    "Maria",
    "Nick",
    "Olga",
    "Paul",
    "Rosa",
    "Simon",
    "Tina",
    "Victor",
    "Wendy",
    "Adam",
    "Bella",
    "Carlos",
    "Diana",
    "Eric",
    "Fiona",
    "George",
    "Helen",
    "Ivan",
    "Julia",
    "Kevin",
    "Linda",
    "Marco",
    "Nora",
    "Oscar",
    "Petra",
    "Ralph",
    "Sofia",
    "Tom",
]

CITIES = [
    "Berlin",
    "Lisbon",
    "Oslo",
    "Chicago",
    "Madrid",
    "Toronto",
    "Vienna",
    "Boston",
    "Dublin",
    "Prague",
    "Lyon",
    "Seattle",
    "Milan",
    "Denver",
]

OPENINGS = """
X: Good morning, {Y}.
X: Hello, {Y}. How are you?  >>  Y: Fine, thanks. And you?
X: Hi, {Y}. You look tired today.  >>  Y: I did not sleep well, but I am fine.
X: Good afternoon.  >>  Y: Good afternoon. What can I do for you?
X: Hello, can I help you?
X: Hello, this is {X} speaking.  >>  Y: Hello, thank you for calling.
X: Excuse me, do you have a minute?  >>  Y: Of course. Please sit down.
X: Good evening, {Y}. It is cold outside.  >>  Y: It is. I am glad to be indoors.
X: {Y}, how was your weekend?  >>  Y: Quiet. I stayed at home and read a book.
X: Next, please. How can I help?
X: Hey, {Y}! I have not seen you for weeks.  >>  Y: I was away. It is good to be back.
X: Come in, please. What is it about?
X: Hello, is this a good moment to talk?  >>  Y: Yes, go ahead. I am listening.
X: Nice to see you again, {Y}.  >>  Y: Nice to see you too.
X: Oh, hello. Are you waiting for someone?
"""

SMALL_TALK = """
X: By the way, the coffee here is very good.  >>  Y: It is. I drink too much of it.
X: It has been raining all morning.  >>  Y: I know, my shoes are still wet.
X: Did you watch the game last night?  >>  Y: No, I fell asleep on the sofa.
X: What a noise! What is going on outside?  >>  Y: They are repairing the street again.
X: I like your new glasses.  >>  Y: Thank you. They were a present.
X: It is very busy here today.  >>  Y: It is always like that after lunch.
X: Just a second, my pen does not write.  >>  Y: Here, take mine.
X: The bus was late again this morning.  >>  Y: Mine too. I walked the last mile.
"""

CORRECTIONS = """
X: Sorry, I said {old}. I meant {new}.  >>  Y: No problem. {New}, then.
X: No, wait. Make it {new}, not {old}.  >>  Y: All right, I changed it.
X: Oh, I was wrong about {old}. It has to be {new}.  >>  Y: Good that you noticed.
"""

CLOSINGS = """
X: Thank you very much.  >>  Y: You are welcome.
X: Thanks for your help.
X: Great. See you then.  >>  Y: See you.
X: Good. Have a nice day.
X: Perfect, goodbye.  >>  Y: Goodbye.
"""

TEMPLATES = """
# meeting
thing = the budget / the new website / the survey / the contract
A: I would like to move the meeting about {thing}. Is {day~} free? | Could we move the meeting about {thing} to {day~}?
B: {Day~} is possible, but only at {time}. | We can do that, if {time} suits you.
~day
A: {Time} is fine with me. | {Time} is good. I will tell the others.
=> {A} wants to move the meeting about {thing}. {A} and {B} will meet on {day} at {time}.
=> {A} asks {B} to move the meeting about {thing} to {day} at {time}.

# meeting
thing = a projector / a microphone / a large screen / ten chairs
A: I need a room for a talk on {day~}. | I have to give a talk on {day~} and I need a room.
B: The big hall is free. Do you need anything else? | You can have the big hall. What else do you need?
~day
A: Yes, I need {thing} as well. | I also need {thing}, please.
=> {A} needs a room for a talk on {day}. {B} offers the big hall, and {A} also asks for {thing}.
=> {A} will give a talk in the big hall on {day} and needs {thing}.

# travel
A: I want to change my flight to {city~}. | Can I change my flight to {city~}?
B: Certainly. Which day do you want to fly? | You can. When would you like to leave?
~city
A: On {day}, if there is a seat. | I would prefer {day}.
B: There is a seat, but the change costs {price}. | That is possible for {price}.
=> {A} wants to change the flight to {city} and fly on {day}. {B} says the change costs {price}.
=> {B} changes the flight to {city} to {day} for {price}.

# travel
thing = a guide / a bus tour / a boat trip / a city map
A: I am going to {city~} with {n} next month. | {N} and I are planning a trip to {city~}.
B: How nice! You should book {thing} early. | Lovely! My advice is to book {thing} now.
~city
A: Good idea. How much is it? | Is that expensive?
B: It was {price} when I was there. | I paid {price} last year.
=> {A} is going to {city} with {n}. {B} advises {A} to book {thing}, which costs {price}.
=> {A} and {n} plan a trip to {city}, and {B} recommends {thing} for {price}.

# travel
thing = suitcase / backpack / guitar / bicycle
A: My {thing} did not arrive on the plane from {city~}. | I came from {city~}, but my {thing} did not arrive.
B: I am sorry. We will look for it. Where are you staying? | That is bad. Can you give me your address?
~city
A: At the {color} hotel near the station. | I am in the {color} hotel at the station.
B: We will bring it there on {day}. | You will have it on {day}.
=> {A}'s {thing} did not arrive from {city}. {B} will bring it to the {color} hotel on {day}.
=> {B} promises to bring the missing {thing} from {city} to {A}'s hotel on {day}.

# shopping
thing = jacket / sweater / lamp / pair of boots
A: I bought this {thing} for {price~}, but it is broken. I want to return it. | I want to return this {thing}. It is broken, and I paid {price~}.
B: Do you have the receipt? | Did you buy it this week?
~price
A: Here is the receipt. I want my money back. | Yes. Could I have my money back?
B: I cannot do that, but I can give you a new one. | We only exchange it for a new one.
=> {A} wants to return a broken {thing} that cost {price}. {B} only offers a new one.
=> {A} wants the money back for a broken {thing}, but {B} can only exchange it.

# shopping
thing = dress / coat / scarf / tablecloth
A: I am looking for a {thing} for {n}. Something in {color~}, maybe. | Do you sell a {thing} in {color~}? It is a present for {n}.
B: We have a nice one in {color~} here. | Here is one in {color~}. It is the last one.
~color
A: How much is it? | And what does it cost?
B: It is {price} this week. | Today you pay {price}.
=> {A} is looking for a {color} {thing} for {n}. {B} has one for {price}.
=> {A} finds a {color} {thing} as a present for {n}. It costs {price}.

# shopping
thing = washing machine / refrigerator / bed / bookshelf
A: I ordered a {thing}, and I want to know when it comes. | When will you deliver the {thing} that I ordered?
B: Our driver can come on {day~} at {time}. | We can deliver it on {day~} at {time}.
~day
A: I will be at work. Can {n} sign for it? | I am not at home. {N} can sign for it.
=> {B} will deliver the {thing} on {day} at {time}, and {n} will sign for it.
=> {A} asks about the delivery of a {thing}. It comes on {day} at {time} and {n} will sign.

# restaurant
count = two / three / five / eight
A: I want to reserve a table for {count} people on {day~}. | Can I reserve a table for {count} people on {day~}?
B: We are full inside. Only the garden is free. | I have only a table in the garden left.
~day
A: The garden is fine. We will come at {time}. | We like the garden. Is {time} possible?
=> {A} reserves a table for {count} people in the garden on {day} at {time}.
=> {A} wants a table for {count} on {day}. {B} only has one in the garden.

# restaurant
food = fish / soup / salad / chicken
A: I am sorry, but this {food} is cold. | Waiter, my {food} is cold.
B: I will bring you another one at once. | Shall I warm it up for you?
A: No, I have no time. I would like to pay now. | I cannot wait. I just want the bill.
B: Then you do not have to pay for the {food}. The rest is {price}. | We do not charge the {food}. It makes {price}.
=> {A} complains that the {food} is cold. {B} does not charge it, and {A} pays {price}.
=> {A} has no time to wait for another {food} and only pays {price}.

# health
illness = a sore throat / a headache / a high fever / a bad cough
A: I have had {illness} since {day~}. | Since {day~} I have {illness}.
B: Let me see. Did you take any medicine? | Do you take anything against it?
~day
A: Only some tea with honey. | No, I just stayed in bed.
B: Take these pills and stay at home until {day2}. | You need these pills. Do not go to work before {day2}.
=> {A} has had {illness} since {day}. {B} prescribes pills and tells {A} to stay at home until {day2}.
=> {B} tells {A} to take pills against {illness} and to rest until {day2}.

# health
part = knee / shoulder / ankle / back
A: My {part} hurts when I walk. | I fell yesterday, and now my {part} hurts.
B: You should not run for a while. Try swimming. | I think you should swim and not run.
A: How long will it take? | When will it be better?
B: About {count2} weeks. Come again on {day}. | It takes {count2} weeks. I want to see you on {day}.
=> {A}'s {part} hurts. {B} advises swimming for {count2} weeks and wants to see {A} on {day}.
=> {B} tells {A} to swim because of the {part} and to come again on {day}.

# school
subject = history / chemistry / French / geography
A: I did not finish my {subject} homework. Can I hand it in on {day~}? | May I hand in my {subject} homework on {day~}?
B: Why did you not finish it? | What happened?
~day
A: I had to look after my little brother. | My grandmother was in the hospital.
B: All right, but you have to read it aloud in class. | Then you may, but you will present it to the class.
=> {A} wants to hand in the {subject} homework on {day}. {B} agrees, but {A} must present it in class.
=> {B} gives {A} until {day} for the {subject} homework.

# school
subject = mathematics / biology / Spanish / physics
A: I do not understand {subject}, and the test is on {day~}. | I am afraid of the {subject} test on {day~}.
B: {N} is very good at it. Ask for help. | Why do you not study with {n}?
~day
A: Good idea. I will call {n} tonight. | I will ask {n} after school.
=> {A} is worried about the {subject} test on {day}. {B} suggests studying with {n}.
=> {A} does not understand {subject} and will ask {n} for help before {day}.

# school
thing = novel / dictionary / atlas / comic
A: I want to borrow this {thing} for {count2} weeks. | Can I keep this {thing} for {count2} weeks?
B: You still have a book that was due on {day}. | There is another book that you should have returned on {day}.
A: Oh, I forgot. What do I have to pay? | I am sorry. Is there a fine?
B: Yes, it is {price}. | You owe us {price}.
=> {A} wants to borrow a {thing}, but has to pay {price} for a book that was due on {day}.
=> {B} tells {A} to pay {price} because another book is late.

# work
job = waiter / gardener / driver / cook
A: I saw that you are looking for a {job}. | I am calling about the job as a {job}.
B: Yes. Have you worked as a {job} before? | Right. Do you have any experience?
A: I worked in {city~} for {count2} years. | Yes, {count2} years in {city~}.
B: That sounds good. Can you start on {day}? | Very good. We need you from {day}.
~city
=> {A} applies for a job as a {job} and has worked in {city} for {count2} years. {B} wants {A} to start on {day}.
=> {B} offers {A} a job as a {job} from {day}.

# work
A: I would like to take {day~} off. | Could I have {day~} off?
B: We have a lot to do. Who will do your work? | Who can do your work on that day?
~day
A: {N} will do it. We have talked about it. | I asked {n}, and it is no problem.
B: Fine, but finish the report first. | Then it is all right, if the report is finished.
=> {A} wants to take {day} off and {n} will do the work. {B} agrees if the report is finished.
=> {B} lets {A} have {day} off, because {n} can do the work.

# work
thing = printer / scanner / copier / telephone
A: The {thing} on the second floor does not work. | I cannot use the {thing} any more.
B: What is the matter with it? | When did that start?
A: It stopped on {day~} and shows a {color} light. | Since {day~} it only shows a {color} light.
B: I will send {n} to repair it. | {N} will come and repair it.
~day
=> {A} says the {thing} stopped working on {day} and shows a {color} light. {B} will send {n} to repair it.
=> The {thing} shows a {color} light, so {B} will ask {n} to repair it.

# lost
thing = umbrella / wallet / camera / watch
A: I lost my {thing} on the train to {city~}. | I left my {thing} on the train to {city~}.
B: What does it look like? | Can you describe it?
~city
A: It is {color}, and my name is inside. | It is small and {color}.
B: Somebody found it. You can fetch it at {time}. | We have it here. Come and get it at {time}.
=> {A} lost a {color} {thing} on the train to {city}. {A} can fetch it at {time}.
=> {B} has found {A}'s {color} {thing}, which was left on the train to {city}.

# lost
animal = cat / dog / parrot / rabbit
A: My {animal} ran away on {day~}. Have you seen it? | Have you seen my {animal}? It has been gone since {day~}.
B: I think {n} saw it near the {place}. | {N} told me about a {animal} near the {place}.
~day
A: Then I will go there at once. | I will look there right now.
=> {A}'s {animal} has been gone since {day}. {B} says that {n} saw it near the {place}.
=> {A} will look for the {animal} near the {place}.

# home
thing = heating / shower / dishwasher / front door
A: The {thing} in my flat is broken. | I have a problem in my flat. The {thing} is broken.
B: I can send somebody on {day~}. | The earliest day is {day~}.
~day
A: I am at home after {time}. | Please not before {time}.
B: Fine. The repair costs {price}. | That works. You will pay about {price}.
=> The {thing} in {A}'s flat is broken. {B} will send somebody on {day} after {time}, which costs {price}.
=> {A} needs somebody to repair the {thing} on {day}.

# home
A: I am interested in the flat near the {place}. | Is the flat near the {place} still free?
B: Yes. The rent is {price} a week. | It is. You would pay {price} a week.
A: Could I see it on {day}? | I would like to see it on {day}.
B: Yes, {n} will show it to you. | {N} has the key and will show you around.
=> {A} is interested in a flat near the {place} for {price} a week. {n} will show it on {day}.
=> {A} will see the flat near the {place} on {day}.

# home
thing = piano / drums / radio / television
A: I cannot sleep, because your {thing} is so loud. | Your {thing} was very loud again at {time}.
B: I am sorry. I did not know that you hear it. | Oh, I had no idea. I am sorry.
A: Could you stop at {time2}? | I want you to stop at {time2}.
B: I promise. And I will bring you a cake on {day}. | Of course. Let me invite you for dinner on {day}.
=> {A} complains about {B}'s loud {thing}. {B} promises to stop at {time2}.
=> {A} asks {B} to stop the {thing} at {time2}, and {B} agrees.

# party
A: I am planning a party for {n} on {day~}. | {N} has a birthday, so I am planning a party on {day~}.
B: Can I bring something? | How nice! What can I bring?
~day
A: A {food} would be great. And do not tell {n}. | Please bring a {food}, and keep it secret.
food = chocolate cake / fruit salad / pizza / pie
=> {A} is planning a secret party for {n} on {day}. {B} will bring a {food}.
=> {B} will bring a {food} to {n}'s party on {day}.

# party
event = concert / film / play / exhibition
A: I have two tickets for the {event} on {day~}. Do you want to come? | Would you come to the {event} with me on {day~}?
B: I would love to. Where do we meet? | Yes, gladly. Tell me where to meet you.
~day
A: At the {place} at {time}. | Let us say {time}, at the {place}.
=> {A} invites {B} to the {event} on {day}. They will meet at the {place} at {time}.
=> {A} and {B} go to the {event} together and meet at the {place}.

# party
sport = tennis / football / chess / golf
A: Would you like to play {sport} on {day~}? | Let us play {sport} on {day~}.
B: I cannot. I have to help {n} with the garden. | Sadly not. I promised {n} to paint the kitchen.
~day
A: What about {day2}, then? | Then maybe on {day2}?
B: {Day2} is perfect. | Yes, {day2} is good.
=> {A} and {B} will play {sport} on {day2}, because {B} has to help {n} on {day}.
=> {B} has no time for {sport} on {day}, so they will play on {day2}.

# bank
A: I want to open an account for {n}. | I would like to open an account. It is for {n}.
B: For that I need a passport and {price}. | Please bring a passport and {price}.
A: I do not have the passport with me. | The passport is at home.
B: Then come back before {time}. | We are here until {time}.
=> {A} wants to open an account for {n}. {B} needs a passport and {price} before {time}.
=> {A} has to come back with a passport to open an account for {n}.

# bank
A: I want to send this parcel to {city~}. | How much is a parcel to {city~}?
B: It is {price}, and it takes {count2} weeks. | It costs {price} and needs {count2} weeks.
~city
A: That is too slow. It is a present for {n}. | Too slow! {N} has a birthday soon.
B: By air it is there on {day}. | If you send it by air, it arrives on {day}.
=> {A} wants to send a parcel to {city} for {n}. {B} says that by air it arrives on {day}.
=> The parcel for {n} takes {count2} weeks, so {B} suggests sending it by air.

# car
thing = brakes / engine / lights / wheels
A: There is something wrong with the {thing} of my car. | My car makes trouble. I think it is the {thing}.
B: Leave it here. It will be ready on {day~}. | We can repair it by {day~}.
~day
A: What will it cost? | How much do I have to pay?
B: Around {price}, I think. | Not more than {price}.
=> {A}'s car has a problem with the {thing}. {B} will repair it by {day} for {price}.
=> {A} leaves the car with {B}, who will repair the {thing} for {price}.

# car
A: Excuse me, how do I get to the {place}? | I am looking for the {place}. Is it far?
B: It is far. Take bus number {number}. | You should take bus number {number}.
A: How often does it go? | When is the next one?
B: It leaves at {time} and costs {price}. | At {time}. The ticket is {price}.
=> {A} wants to go to the {place}. {B} says to take bus number {number} at {time}.
=> {B} tells {A} to take bus number {number} to the {place}, which costs {price}.

# hotel
A: I have a room here until {day~}, and I want to stay longer. | I want to keep my room longer than {day~}.
B: We are full, but you can have a smaller room. | Only a smaller room is free after that.
~day
A: Is it cheaper? | What is the price?
B: Yes, it is {price} a night, with breakfast. | It is {price} a night, and breakfast is free.
=> {A} wants to stay longer than {day}. {B} offers a smaller room for {price} a night.
=> {A} can have a smaller room with breakfast for {price} a night.

# hotel
thing = window / air conditioner / safe / hair dryer
A: I am in room {number~}, and the {thing} does not work. | The {thing} in room {number~} does not work.
B: I am sorry. Would you like another room? | I apologize. Do you want to change your room?
~number
A: Yes, please. A room with a view of the {place}. | Only if I can see the {place} from there.
B: You can move at {time}. | It will be ready at {time}.
=> The {thing} in room {number} does not work. {A} can move to a room with a view of the {place} at {time}.
=> {A} complains about the {thing}, and {B} offers another room.
"""
