"use strict";

// ----- What is to be heard, and what has been answered: functions of their arguments alone

const SCALE = ["Bad", "Poor", "Fair", "Good", "Excellent"];

/** Numbers in [0, 1) that follow from a text: FNV-1a, then mulberry32. */
function randomFrom(text) {
  let state = 2166136261;
  for (const character of text) state = Math.imul(state ^ character.codePointAt(0), 16777619);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** A copy of a list in random order (Fisher and Yates). */
function shuffled(list, random) {
  const copy = [...list];
  for (let last = copy.length - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1));
    [copy[last], copy[other]] = [copy[other], copy[last]];
  }
  return copy;
}

/** The least number of steps between two items with the same sounds; more than the list is long when all differ. */
function closestRepeat(items) {
  const places = new Map();
  let closest = items.length + 1;
  items.forEach((item, place) => {
    const sounds = [...item.sounds].sort().join();
    if (places.has(sounds)) closest = Math.min(closest, place - places.get(sounds));
    places.set(sounds, place);
  });
  return closest;
}

/** All items as one listener meets them: in an order of their own, the sides of pairs too, repeats kept apart. */
function presentation(items, listener) {
  const random = randomFrom(listener);
  const apart = Math.min(4, Math.floor(items.length / 4));
  let order = shuffled(items, random);
  for (let trial = 0; trial < 200 && closestRepeat(order) < apart; trial++) order = shuffled(items, random);
  return order.map((item) => ({ id: item.id, sounds: shuffled(item.sounds, random) }));
}

function newState(test, listener, now) {
  return { test: test.id, listener, started: now, answers: [] };
}

/** The state that was kept, or null where none was, it is damaged, or it belongs to another test. */
function restored(text, test) {
  try {
    const state = JSON.parse(text);
    const known = new Set(test.items.map((item) => item.id));
    const whole = typeof state.listener === "string" && state.answers.every((answer) => known.has(answer.item));
    return state.test === test.id && whole ? state : null;
  } catch {
    return null;
  }
}

/** What the listener says of an item; a rating of null says that it could not be played. */
function answerOf(shown, rating, plays, seconds) {
  return { item: shown.id, sounds: shown.sounds, rating, plays, seconds: Math.round(seconds * 10) / 10 };
}

/** How many answers there are to choose from. */
function choices(type) {
  return type === "mos" ? SCALE.length : 2;
}

/** Which sound the space bar plays: the first that is still to be heard to its end, then each in turn. */
function soundToPlay(heard, last) {
  const unheard = heard.indexOf(false);
  return unheard >= 0 ? unheard : (last + 1) % heard.length;
}

function resultOf(test, state, now) {
  return {
    format: "tonefield listening result",
    version: 1,
    test: test.id,
    type: test.type,
    listener: state.listener,
    started: state.started,
    saved: now,
    complete: state.answers.length === test.items.length,
    answers: state.answers,
  };
}

function minutesLeft(test, answered) {
  return Math.max(1, Math.round((test.minutes * (test.items.length - answered)) / test.items.length));
}

// ----- The page

function start() {
  const find = (id) => document.getElementById(id);
  const test = JSON.parse(find("test").textContent);
  const place = `tonefield-listening-${test.id}`;
  const audio = new Audio();
  const now = () => new Date().toISOString();

  let storage = null;
  try {
    storage = window.localStorage;
    storage.setItem(`${place}-try`, "1");
    storage.removeItem(`${place}-try`);
  } catch {
    storage = null;
    find("stored").hidden = true;
    find("not-stored").hidden = false;
  }

  let state, order, shown, heard, plays, rating, playing, last, since, frame;
  const players = [];

  function listenerName() {
    return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  function begin(kept) {
    state = kept || newState(test, listenerName(), now());
    order = presentation(test.items, state.listener);
  }

  function keep() {
    try {
      storage?.setItem(place, JSON.stringify(state));
    } catch {
      say("This browser has no room left to remember your answers: please do not close the page.");
    }
  }

  function say(text) {
    find("status").textContent = text;
  }

  function show(id) {
    audio.pause();
    for (const screen of ["intro", "item", "end"]) find(screen).hidden = screen !== id;
    const total = test.items.length;
    const answered = state.answers.length;
    find("header").hidden = id === "intro" && answered === 0;
    find("fill").style.width = `${(100 * answered) / total}%`;
    find("count").textContent = id === "item" ? `${answered + 1} of ${total}` : `${answered} of ${total} answered`;
    window.scrollTo(0, 0);
  }

  // -- playing

  let url = null;

  function load(base64) {
    if (url) URL.revokeObjectURL(url);
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    url = URL.createObjectURL(new Blob([bytes], { type: "audio/wav" }));
    audio.src = url;
  }

  function play(index) {
    if (playing !== index) {
      playing = last = index;
      load(test.sounds[shown.sounds[index]]);
    } else if (!audio.paused) {
      audio.pause();
      return;
    }
    sound();
  }

  function sound() {
    audio.play().catch((error) => {
      // An AbortError says that it was paused before it began.
      if (error.name !== "AbortError") say("This sound cannot be played by your browser.");
    });
  }

  function draw() {
    cancelAnimationFrame(frame);
    players.forEach(({ button, ring }, index) => {
      const here = playing === index;
      const active = here && !audio.paused;
      button.classList.toggle("playing", active);
      button.classList.toggle("started", here || heard[index]);
      const name = players.length > 1 ? ` ${"AB"[index]}` : "";
      button.setAttribute("aria-label", `${active ? "Pause" : "Play"} sound${name}`);
      const done = here && audio.duration ? audio.currentTime / audio.duration : 0;
      ring.style.strokeDashoffset = here ? 100 * (1 - done) : heard[index] ? 0 : 100;
    });
    if (!audio.paused && !audio.ended) frame = requestAnimationFrame(draw);
  }

  audio.addEventListener("play", draw);
  audio.addEventListener("pause", draw);
  audio.addEventListener("error", () => {
    if (audio.hasAttribute("src")) say("This sound cannot be played by your browser.");
  });
  audio.addEventListener("ended", () => {
    if (playing === null) return;
    heard[playing] = true;
    plays += 1;
    playing = null;
    draw();
    invite();
  });

  function invite() {
    const all = heard.every(Boolean);
    find("answers").disabled = !all;
    if (all) say("Choose an answer.");
    else if (heard.some(Boolean)) say(`Now listen to ${"AB"[heard.indexOf(false)]}.`);
    else say(heard.length > 1 ? "Listen to both sounds." : "Listen to the sound.");
  }

  // -- an item

  function makePlayer(index, count) {
    const slot = document.createElement("div");
    slot.className = "slot";
    slot.innerHTML = `<button type="button" class="player"><svg viewBox="0 0 112 112" aria-hidden="true">
      <circle class="ring" cx="56" cy="56" r="53.5" pathLength="100" stroke-dasharray="100" stroke-dashoffset="100"/>
      <path class="play" d="M46 36.5v39a3 3 0 0 0 4.6 2.5l30-19.5a3 3 0 0 0 0-5l-30-19.5A3 3 0 0 0 46 36.5z"/>
      <path class="pause" d="M41 36h10v40H41zM61 36h10v40H61z"/></svg></button>`;
    const button = slot.querySelector("button");
    button.addEventListener("click", () => play(index));
    if (count > 1) slot.insertAdjacentHTML("beforeend", `<span class="name" aria-hidden="true">${"AB"[index]}</span>`);
    find("players").append(slot);
    players.push({ button, ring: slot.querySelector(".ring") });
  }

  function makeAnswer(value) {
    const words = test.type === "mos" ? SCALE[value - 1] : `${"AB"[value - 1]} is better`;
    const label = document.createElement("label");
    label.className = "answer";
    label.innerHTML = `<input type="radio" name="answer" value="${value}">
      ${test.type === "mos" ? `<span class="digit">${value}</span>` : ""}<span>${words}</span>`;
    label.firstElementChild.addEventListener("change", () => choose(value));
    find("answers").append(label);
  }

  function choose(value) {
    rating = value;
    find("answers").querySelectorAll("input")[value - 1].checked = true;
    find("next").disabled = false;
    say("");
  }

  function showItem() {
    shown = order[state.answers.length];
    if (!shown) return showEnd();
    heard = shown.sounds.map(() => false);
    plays = 0;
    rating = playing = null;
    last = -1;
    since = performance.now();
    for (const input of find("answers").querySelectorAll("input")) input.checked = false;
    find("next").disabled = true;
    find("next").textContent = state.answers.length + 1 === test.items.length ? "Finish" : "Next";
    show("item");
    draw();
    invite();
    find("question").focus();
  }

  function answer(value) {
    state.answers.push(answerOf(shown, value, plays, (performance.now() - since) / 1000));
    keep();
    showItem();
  }

  function next() {
    if (rating !== null) answer(rating);
  }

  // -- the end

  function showEnd() {
    const complete = state.answers.length === test.items.length;
    const text = JSON.stringify(resultOf(test, state, now()), null, 1);
    const save = find("save");
    if (save.href) URL.revokeObjectURL(save.href);
    save.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    save.download = `listening-${state.listener}.json`;
    find("text").value = text;
    find("thanks").textContent = complete ? "Done. Thank you!" : "Thank you so far";
    find("resume").hidden = complete;
    find("again").parentElement.hidden = !complete;
    show("end");
    find("thanks").focus();
  }

  // -- keys and buttons

  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (!find("intro").hidden && event.key === "Enter" && !event.target.closest("button")) return find("begin").click();
    if (find("item").hidden) return;
    const target = event.target.closest("button, input:not(:checked)");
    const digit = /^[1-9]$/.test(event.key) ? Number(event.key) : 0;
    if (event.key === " " && !target) play(playing ?? soundToPlay(heard, last));
    else if (event.key === "Enter" && rating !== null && !target?.classList.contains("link")) next();
    else if (digit && digit <= choices(test.type)) {
      if (heard.every(Boolean)) choose(digit);
      else say("You can answer when you have listened to the end.");
    } else if (/^[ab]$/i.test(event.key) && test.type === "pairs") play("ab".indexOf(event.key.toLowerCase()));
    else return;
    event.preventDefault();
  });
  find("begin").addEventListener("click", () => {
    keep();
    showItem();
  });
  find("next").addEventListener("click", next);
  find("broken").addEventListener("click", () => answer(null));
  find("stop").addEventListener("click", showEnd);
  find("resume").addEventListener("click", showItem);
  find("again").addEventListener("click", () => {
    begin(null);
    showIntro();
  });
  find("noise").addEventListener("click", () => {
    playing = null;
    if (!audio.paused) return audio.pause();
    load(test.noise);
    sound();
  });
  for (const name of ["play", "pause"]) {
    audio.addEventListener(name, () => {
      const on = name === "play" && !find("intro").hidden;
      find("noise").textContent = on ? "Stop the test noise" : "Play the test noise";
      find("noise").setAttribute("aria-pressed", on);
    });
  }

  function showIntro() {
    const answered = state.answers.length;
    const left = test.items.length - answered;
    const what =
      test.type === "mos" ? `short sound${left === 1 ? "" : "s"}` : `pair${left === 1 ? "" : "s"} of short sounds`;
    const minutes = minutesLeft(test, answered);
    find("task").textContent =
      (answered ? `Welcome back. ${left} more ${what}` : `You will hear ${left} ${what} and judge each`) +
      `, about ${minutes} minute${minutes > 1 ? "s" : ""}.`;
    find("begin").textContent = answered ? "Go on" : "Begin";
    show("intro");
  }

  heard = [];
  document.body.classList.add(test.type);
  for (let index = 0; index < test.items[0].sounds.length; index++) makePlayer(index, test.items[0].sounds.length);
  for (let value = 1; value <= choices(test.type); value++) makeAnswer(value);
  find("keys").innerHTML =
    test.type === "mos"
      ? "<kbd>space</kbd> plays · <kbd>1</kbd> to <kbd>5</kbd> rate · <kbd>enter</kbd> goes on"
      : "<kbd>space</kbd> plays · <kbd>1</kbd> and <kbd>2</kbd> choose · <kbd>enter</kbd> goes on";
  begin(storage && restored(storage.getItem(place), test));
  if (state.answers.length === test.items.length) showEnd();
  else showIntro();
}

start();
