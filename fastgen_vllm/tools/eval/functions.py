"""Functions that the tool-calling prompts of ``fastgen eval`` offer, and questions for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Function:
    """``parameters``: a type and a description by name; ``required`` are the first so many."""

    name: str
    description: str
    parameters: dict[str, tuple[str, str]]
    required: int
    questions: tuple[str, str]

    @property
    def schema(self) -> dict[str, Any]:
        """As the OpenAI API writes it."""
        properties = {
            name: {"type": kind, "description": text}
            for name, (kind, text) in self.parameters.items()
        }
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": properties,
                    "required": list(self.parameters)[: self.required],
                },
            },
        }


FUNCTIONS = (
    Function(
        "get_weather_forecast",
        "Get the weather forecast of a city for the next days, with temperature, wind and rain.",
        {
            "city": ("string", "The name of the city, without the country, for example Busan"),
            "days": ("integer", "How many days ahead, from 1 to 14, today included"),
            "unit": ("string", "The unit of temperatures: celsius or fahrenheit"),
            "include_hourly": ("boolean", "Whether to give every hour and not just the day"),
        },
        2,
        (
            "What will the weather be like in Gwangju over the next 5 days, in celsius?",
            "I am going to Lisbon. Tell me the forecast for 3 days, hour by hour.",
        ),
    ),
    Function(
        "search_flights",
        "Search scheduled flights between two airports on a date and sort them by price or time.",
        {
            "origin": ("string", "The three-letter IATA code of the airport of departure"),
            "destination": ("string", "The three-letter IATA code of the airport of arrival"),
            "date": ("string", "The date of departure in the form YYYY-MM-DD"),
            "passengers": ("integer", "The number of travellers, children over two included"),
            "cabin": ("string", "economy, premium, business or first"),
            "max_stops": ("integer", "The most stops on the way; 0 for direct flights only"),
        },
        3,
        (
            "Find me a direct flight from ICN to CDG on 2026-03-14 for two people.",
            "I need a business class flight from GMP to HND on 2026-07-02.",
        ),
    ),
    Function(
        "send_email",
        "Send an email from the user's own address to one or more people.",
        {
            "to": ("array", "The addresses of those who are to receive it"),
            "subject": ("string", "The subject line, of at most 120 characters"),
            "body": ("string", "The text of the message, without a signature"),
            "cc": ("array", "The addresses of those who receive a copy"),
            "priority": ("string", "low, normal or high"),
        },
        3,
        (
            "Write to mina@example.org with the subject 'Budget' that the meeting is at ten.",
            "Email paul@example.com, high priority: the server room is too hot. Subject 'Heat'.",
        ),
    ),
    Function(
        "create_calendar_event",
        "Create an event in the user's calendar and invite those who are to take part.",
        {
            "title": ("string", "A short title that is shown in the calendar"),
            "start": ("string", "When it begins, in the form YYYY-MM-DDTHH:MM"),
            "duration_minutes": ("integer", "How long it takes, in minutes"),
            "location": ("string", "The room or the address where it takes place"),
            "attendees": ("array", "The email addresses of those who are invited"),
            "reminder_minutes": ("integer", "How many minutes before it to remind the user"),
        },
        3,
        (
            "Put 'Dentist' into my calendar on 2026-05-06 at 14:30 for 45 minutes.",
            "Schedule 'Design review' for 2026-02-11T09:00, an hour long, in room Halla.",
        ),
    ),
    Function(
        "convert_currency",
        "Convert an amount of money from one currency into another at the rate of a given day.",
        {
            "amount": ("number", "The amount in the currency that it is converted from"),
            "source": ("string", "The three-letter ISO 4217 code of the currency to convert from"),
            "target": ("string", "The three-letter ISO 4217 code of the currency to convert to"),
            "date": ("string", "The day of the rate, YYYY-MM-DD; today if it is left out"),
        },
        3,
        (
            "How much is 250000 KRW in EUR?",
            "What were 99.5 USD worth in JPY on 2025-12-31?",
        ),
    ),
    Function(
        "query_database",
        "Run a read-only SQL query against one of the company's databases and return the rows.",
        {
            "database": ("string", "The name of the database: sales, stock or people"),
            "query": ("string", "One SELECT statement in PostgreSQL's dialect"),
            "limit": ("integer", "The most rows to return, at most 10000"),
            "timeout_seconds": ("integer", "How long the query may take before it is stopped"),
        },
        2,
        (
            "How many rows does the table orders in the sales database have?",
            "Show the names of 20 employees from the table staff in the people database.",
        ),
    ),
    Function(
        "translate_text",
        "Translate a text between languages and keep its line breaks and its tone.",
        {
            "text": ("string", "The text to translate"),
            "target_language": ("string", "The ISO 639-1 code of the language to translate into"),
            "source_language": ("string", "The ISO 639-1 code of the text; found out if left out"),
            "formality": ("string", "default, formal or informal"),
        },
        2,
        (
            "Translate 'The library opens at nine' into Korean, formally.",
            "How do you say 'Where is the station?' in French?",
        ),
    ),
    Function(
        "set_thermostat",
        "Set the temperature of a room, at once or at a given time, and the mode of the heating.",
        {
            "room": ("string", "The room: kitchen, bedroom, office, bathroom or living room"),
            "temperature": ("number", "The wanted temperature in degrees Celsius, from 5 to 30"),
            "mode": ("string", "heat, cool, auto or off"),
            "at": ("string", "The time of day, HH:MM, at which it begins; now if left out"),
        },
        2,
        (
            "Make the bedroom 18.5 degrees from 22:15 on.",
            "Cool the office to 21 degrees.",
        ),
    ),
    Function(
        "find_restaurants",
        "Find restaurants near a place that are open at a time and serve a given cuisine.",
        {
            "near": ("string", "An address, a sight or a station"),
            "cuisine": ("string", "The kind of food, for example korean, italian or indian"),
            "open_at": ("string", "The time at which it must be open, HH:MM"),
            "price_level": ("integer", "From 1, cheap, to 4, expensive"),
            "max_distance_m": ("integer", "How far away it may be, in metres"),
        },
        1,
        (
            "Where can I eat Italian food near Seoul Station at 21:00?",
            "Find a cheap Indian restaurant within 800 metres of the Louvre.",
        ),
    ),
    Function(
        "track_parcel",
        "Look up where a parcel is now and when it is expected to arrive.",
        {
            "tracking_number": ("string", "The number on the label, letters and digits"),
            "carrier": ("string", "The company that carries it: dhl, ups, cj or post"),
            "language": ("string", "The ISO 639-1 code of the language of the answer"),
        },
        1,
        (
            "Where is my parcel with the number KR40817726DE that CJ carries?",
            "When does DHL deliver JD014600007?",
        ),
    ),
    Function(
        "create_ticket",
        "Open a ticket in the issue tracker of a project and assign it to somebody.",
        {
            "project": ("string", "The short key of the project in capitals, for example WEB"),
            "title": ("string", "One sentence that says what is wrong or wanted"),
            "description": ("string", "What happened, what was expected and how to see it again"),
            "assignee": ("string", "The login name of the person who is to deal with it"),
            "severity": ("string", "trivial, minor, major or critical"),
            "labels": ("array", "Words to find it by"),
        },
        2,
        (
            "Open a critical ticket in project PAY: the refund button does nothing.",
            "File in project APP that dark mode flickers, and assign it to jisoo.",
        ),
    ),
    Function(
        "resize_image",
        "Resize an image file and save the result in another format where one is asked for.",
        {
            "path": ("string", "The path of the image file"),
            "width": ("integer", "The new width in pixels"),
            "height": ("integer", "The new height in pixels; in proportion if it is left out"),
            "format": ("string", "png, jpeg or webp; as before if it is left out"),
            "quality": ("integer", "From 1 to 100, for jpeg and webp"),
        },
        2,
        (
            "Make photos/cat.png 640 pixels wide.",
            "Resize /data/banner.jpeg to 1920 by 400 and save it as webp with quality 80.",
        ),
    ),
    Function(
        "get_stock_price",
        "Get the price of a share at an exchange, now or at the close of a day in the past.",
        {
            "symbol": ("string", "The ticker symbol, for example 005930 or AAPL"),
            "exchange": ("string", "The exchange: KRX, NASDAQ, NYSE or LSE"),
            "date": ("string", "A day in the form YYYY-MM-DD; now if it is left out"),
            "currency": ("string", "The ISO 4217 code of the currency of the answer"),
        },
        1,
        (
            "What does a share of 035720 cost at the KRX?",
            "What was the price of MSFT on 2025-10-01 in EUR?",
        ),
    ),
    Function(
        "book_meeting_room",
        "Reserve a meeting room of a building for a number of people and a stretch of time.",
        {
            "building": ("string", "The letter of the building, A to F"),
            "date": ("string", "The day in the form YYYY-MM-DD"),
            "start_time": ("string", "When it begins, HH:MM"),
            "end_time": ("string", "When it ends, HH:MM"),
            "people": ("integer", "How many seats are needed"),
            "equipment": ("array", "What it must have: screen, camera, whiteboard or phone"),
        },
        4,
        (
            "Reserve a room in building C on 2026-04-09 from 13:00 to 15:30 for 8 people.",
            "I need a room with a whiteboard in building A on 2026-01-20, 10:00 to 11:00.",
        ),
    ),
    Function(
        "play_music",
        "Play a song, an album or a list on one of the speakers at home.",
        {
            "query": ("string", "The title, or the artist and the title"),
            "speaker": ("string", "The speaker: kitchen, desk, bedroom or everywhere"),
            "volume": ("integer", "From 0 to 100"),
            "shuffle": ("boolean", "Whether to play in random order"),
            "repeat": ("string", "off, one or all"),
        },
        1,
        (
            "Play Clair de Lune in the kitchen at volume 30.",
            "Shuffle the album Kind of Blue on all speakers.",
        ),
    ),
    Function(
        "calculate_route",
        "Work out a route between two places, with its length and the time that it takes.",
        {
            "start": ("string", "The address or the place where it begins"),
            "end": ("string", "The address or the place where it ends"),
            "mode": ("string", "car, bicycle, foot or transit"),
            "avoid": ("array", "What to avoid: tolls, ferries or motorways"),
            "departure": ("string", "When to leave, YYYY-MM-DDTHH:MM; now if it is left out"),
        },
        2,
        (
            "How do I get from Daejeon to Sokcho by car without tolls?",
            "Plan a bicycle route from the harbour to the castle.",
        ),
    ),
    Function(
        "restart_service",
        "Restart a service on a group of servers, one after the other or all at once.",
        {
            "service": ("string", "The name of the systemd unit without .service"),
            "environment": ("string", "staging or production"),
            "strategy": ("string", "rolling or all_at_once"),
            "max_unavailable": ("integer", "How many servers may be down at the same time"),
            "reason": ("string", "Why, for the log of changes"),
        },
        2,
        (
            "Restart nginx in staging, all at once.",
            "Do a rolling restart of billing-api in production, 2 servers at a time at most.",
        ),
    ),
    Function(
        "set_reminder",
        "Remind the user of something at a time, once or again and again.",
        {
            "text": ("string", "What to remind the user of"),
            "time": ("string", "When, in the form YYYY-MM-DDTHH:MM"),
            "repeat": ("string", "never, daily, weekly or monthly"),
            "channel": ("string", "push, email or sms"),
        },
        2,
        (
            "Remind me by sms to water the plants at 2026-06-01T08:00, every week.",
            "Remind me on 2026-09-15 at 17:45 to call the bank.",
        ),
    ),
    Function(
        "search_papers",
        "Search scientific papers by words, author and year, the most cited ones first.",
        {
            "query": ("string", "Words of the title or of the abstract"),
            "author": ("string", "The family name of one of the authors"),
            "year_from": ("integer", "The earliest year of publication"),
            "year_to": ("integer", "The latest year of publication"),
            "max_results": ("integer", "The most papers to return, from 1 to 100"),
        },
        1,
        (
            "Find 10 papers on solid state batteries since 2023.",
            "Which papers about attention did Vaswani write before 2019?",
        ),
    ),
    Function(
        "block_card",
        "Block a bank card so that it can no longer be used, and order a new one if wanted.",
        {
            "last_digits": ("string", "The last four digits of the card's number"),
            "reason": ("string", "lost, stolen, damaged or fraud"),
            "order_replacement": ("boolean", "Whether a new card is to be sent"),
            "address": ("string", "Where the new card goes; the known address if left out"),
        },
        2,
        (
            "Somebody stole my card that ends in 4921. I need a new one.",
            "I lost the card ending in 0037, please block it.",
        ),
    ),
    Function(
        "list_files",
        "List the files of a folder whose names match a pattern, with their sizes and dates.",
        {
            "folder": ("string", "The absolute path of the folder"),
            "pattern": ("string", "A pattern of the shell, for example *.csv"),
            "recursive": ("boolean", "Whether to look into folders within it"),
            "sort_by": ("string", "name, size or date"),
            "limit": ("integer", "The most files to list"),
        },
        1,
        (
            "Which csv files are in /srv/reports and below, the largest first?",
            "List the 5 newest files in /var/log.",
        ),
    ),
    Function(
        "add_expense",
        "Enter an expense into the user's household book.",
        {
            "amount": ("number", "How much was paid"),
            "currency": ("string", "The three-letter ISO 4217 code"),
            "category": ("string", "food, rent, travel, health, fun or other"),
            "date": ("string", "The day on which it was paid, YYYY-MM-DD"),
            "note": ("string", "What it was for"),
            "paid_by": ("string", "cash, card or transfer"),
        },
        3,
        (
            "I paid 18500 KRW for lunch on 2026-02-03, by card.",
            "Enter 42.90 EUR for a train ticket, in cash.",
        ),
    ),
    Function(
        "start_timer",
        "Start a timer in the kitchen that rings when it has run out.",
        {
            "minutes": ("integer", "How long, in whole minutes"),
            "label": ("string", "What it is for, said when it rings"),
            "sound": ("string", "bell, chime or voice"),
            "repeat": ("integer", "How many times it begins again"),
        },
        1,
        (
            "Start a timer for the rice, 12 minutes, with a chime.",
            "Wake me from my nap in 25 minutes.",
        ),
    ),
    Function(
        "get_train_times",
        "Get the next trains between two stations after a given time.",
        {
            "origin": ("string", "The station of departure"),
            "destination": ("string", "The station of arrival"),
            "after": ("string", "The earliest departure, YYYY-MM-DDTHH:MM; now if left out"),
            "train_type": ("string", "any, express or local"),
            "max_results": ("integer", "The most trains to list"),
        },
        2,
        (
            "When do express trains go from Seoul to Daegu after 2026-08-08T07:00?",
            "Show me the next 3 trains from Mokpo to Iksan.",
        ),
    ),
)
