"use strict";

const find = (selector, root = document) => root.querySelector(selector);
const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// Theme: the system's, until the button is pressed.

find("#theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  try { localStorage.setItem("tav-theme", root.dataset.theme); } catch { /* Without storage, the choice lasts for this page only. */ }
});

// Player: the first video leads. All videos start together once each has reached its position, and again each time the
// video loops. One that drifts by part of a frame runs slightly faster or slower; one that drifts further is moved.

const videos = findAll("video");
if (videos.length) {
  const leader = videos[0];
  const frames = Number(leader.dataset.frames), fps = Number(leader.dataset.fps);
  const scrub = find("#scrub"), playButton = find("#play");
  const visible = () => videos.filter((video) => !video.closest("[hidden]"));
  const corrected = new Map(); // When each video was last moved, in ms.
  let playing = false, speed = 1, frame = 0, startNumber = 0;

  const followers = findAll("[data-row], [data-column]").map((element) => {
    const sizes = element.closest("[data-frame-numbers]")?.dataset.frameNumbers.split(" ").map(Number);
    return { element, size: Number(element.dataset.size), axis: "row" in element.dataset ? "y" : "x", sizes };
  });

  const show = (next) => {
    frame = next;
    scrub.value = next;
    scrub.setAttribute("aria-valuetext", `frame ${next + 1} of ${frames}`);
    find("#counter b").textContent = next + 1;
    for (const { element, size, axis, sizes } of followers) {
      // The heat map of a long clip has only some frames: mark the last one up to the current frame.
      const place = sizes ? Math.max(0, sizes.findLastIndex((number) => number <= next + 1)) : next;
      element.setAttribute(axis, place * size);
    }
  };

  // Resolves when the video has reached the position, or after a second: one that does not load must not block the others.
  const seek = (video, time) => new Promise((done) => {
    const go = () => {
      video.addEventListener("seeked", done, { once: true });
      video.currentTime = clamp(time, 0, Math.max(0, video.duration - 0.001));
    };
    if (video.readyState >= 1) go();
    else video.addEventListener("loadedmetadata", go, { once: true });
    setTimeout(done, 1000);
  });

  const start = async (time) => {
    const number = ++startNumber, all = visible();
    for (const video of videos) video.pause();
    await Promise.all(all.map((video) => seek(video, time)));
    if (number !== startNumber) return; // Superseded by a later start or a pause.
    for (const video of all) {
      video.playbackRate = speed;
      video.play().catch(() => { if (video === leader && number === startNumber) setPlaying(false); });
    }
  };

  const keepInStep = () => {
    if (!playing) return;
    const now = leader.currentTime;
    for (const video of leader.paused ? [] : visible()) {
      if (video === leader || video.paused || video.seeking) continue;
      const off = (video.currentTime - now) * fps;
      if (Math.abs(off) > 2 && performance.now() - (corrected.get(video) ?? 0) > 1000) {
        corrected.set(video, performance.now());
        seek(video, now);
      } else {
        const rate = speed * (Math.abs(off) < 0.05 ? 1 : 1 - clamp(0.4 * off, -0.2, 0.2));
        if (video.playbackRate !== rate) video.playbackRate = rate;
      }
    }
    show(clamp(Math.floor(now * fps + 0.01), 0, frames - 1));
    requestAnimationFrame(keepInStep);
  };

  const setPlaying = (on) => {
    if (on === playing) return;
    playing = on;
    playButton.classList.toggle("playing", on);
    playButton.setAttribute("aria-label", on ? "Pause" : "Play");
    if (on) {
      start(leader.currentTime);
      requestAnimationFrame(keepInStep);
    } else {
      startNumber += 1;
      for (const video of videos) video.pause();
      goTo(frame);
    }
  };

  const goTo = (next) => {
    setPlaying(false);
    show(((next % frames) + frames) % frames);
    // Seek to the middle of the frame, so that rounding cannot show another one.
    for (const video of visible()) seek(video, (frame + 0.5) / fps);
  };

  playButton.addEventListener("click", () => setPlaying(!playing));
  find("#back").addEventListener("click", () => goTo(frame - 1));
  find("#forward").addEventListener("click", () => goTo(frame + 1));
  scrub.addEventListener("input", () => goTo(Number(scrub.value)));
  find("#speed").addEventListener("change", (event) => {
    speed = Number(event.target.value);
    for (const video of videos) video.playbackRate = speed;
  });
  find("#truth")?.addEventListener("change", (event) => {
    find("#edits").classList.toggle("with-truth", event.target.checked);
    for (const screen of findAll(".truth")) screen.hidden = !event.target.checked;
    if (playing) start(leader.currentTime);
    else goTo(frame);
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target;
    // Elements with their own keys keep them.
    if (event.key === " " && !target.closest("button, summary, select, a, input[type=checkbox]")) setPlaying(!playing);
    else if (event.key === "ArrowLeft" && !target.closest("select, input, .scroll, .heat")) goTo(frame - 1);
    else if (event.key === "ArrowRight" && !target.closest("select, input, .scroll, .heat")) goTo(frame + 1);
    else return;
    event.preventDefault();
  });

  // Some browsers cannot play a video from a data: address, but can play the same bytes as a blob.
  const asBlob = (address) => {
    const [, type, text] = address.match(/^data:([^;]+);base64,(.*)$/);
    return URL.createObjectURL(new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type }));
  };

  for (const video of videos) {
    video.controls = video.loop = false;
    video.addEventListener("click", () => setPlaying(!playing));
    video.addEventListener("error", () => {
      if (!video.src.startsWith("data:")) {
        find("#unplayable").hidden = false;
        return;
      }
      video.src = asBlob(video.src);
      if (playing) start(leader.currentTime);
    });
  }
  leader.addEventListener("ended", () => { if (playing) start(0); });
  show(0);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) setPlaying(true);
}

// Table: a click on a heading sorts the best first, a second click the worst. Rows without a value stay last.

for (const button of findAll("table.scores thead button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), body = find("tbody.sorted");
    const bestFirst = button.dataset.better === "higher" ? "descending" : "ascending";
    const worstFirst = bestFirst === "descending" ? "ascending" : "descending";
    const order = heading.getAttribute("aria-sort") === bestFirst ? worstFirst : bestFirst;
    for (const other of findAll("th", heading.parentElement)) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order);
    const value = (row) => row.cells[heading.cellIndex].dataset.value;
    const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    const rows = [...body.rows].sort((first, second) => {
      const [a, b] = [value(first), value(second)];
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return order === "ascending" ? compare(a, b) : compare(b, a);
    });
    body.append(...rows);
  });
}

// Tooltips of headings and of heat map cells, by mouse, touch and keyboard.

const tip = find("#tip");
let pointedAt = null;
const placeTip = () => {
  if (!pointedAt) return;
  const box = pointedAt.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const above = box.top - height - 8;
  tip.style.left = `${clamp(box.left + box.width / 2 - width / 2, 8, Math.max(8, innerWidth - width - 8))}px`;
  tip.style.top = `${above < 8 ? box.bottom + 8 : above}px`;
};
const showTip = (text, element) => {
  pointedAt = element;
  tip.textContent = text;
  tip.hidden = false;
  placeTip();
};
const hideTip = () => {
  pointedAt = null;
  if (tip) tip.hidden = true;
};
for (const element of findAll("[data-tip]")) {
  const open = () => showTip(element.dataset.tip, element);
  element.setAttribute("aria-describedby", "tip");
  element.addEventListener("mouseenter", open);
  element.addEventListener("focus", open);
  element.addEventListener("mouseleave", hideTip);
  element.addEventListener("blur", hideTip);
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
document.addEventListener("scroll", placeTip, { passive: true, capture: true }); // Includes scrolling of the table.

for (const map of findAll(".heat svg")) {
  const numbers = map.dataset.frameNumbers.split(" "), count = numbers.length;
  const values = map.dataset.values.split(" ");
  const cursor = find(".cursor", map), picture = find("image", map);
  let row = 0, column = 0;
  const point = (nextRow, nextColumn, announce) => {
    row = clamp(nextRow, 0, count - 1);
    column = clamp(nextColumn, 0, count - 1);
    const size = 160 / count;
    cursor.setAttribute("x", column * size);
    cursor.setAttribute("y", row * size);
    cursor.setAttribute("visibility", "visible");
    const value = (values[row * count + column] / 10000).toFixed(4);
    const text = row === column ? `frame ${numbers[row]} with itself: ${value}` : `frames ${numbers[row]} and ${numbers[column]}: ${value}`;
    showTip(text, cursor);
    if (announce) find("#reading").textContent = text;
  };
  const leave = () => { cursor.setAttribute("visibility", "hidden"); hideTip(); };
  const under = (event) => {
    const box = picture.getBoundingClientRect();
    const at = (place, from, size) => Math.floor(((place - from) / size) * count);
    point(at(event.clientY, box.top, box.height), at(event.clientX, box.left, box.width));
  };
  picture.addEventListener("pointermove", under);
  picture.addEventListener("pointerdown", under);
  map.addEventListener("pointerleave", leave);
  map.addEventListener("focus", () => { if (map.matches(":focus-visible")) point(row, column, true); });
  map.addEventListener("blur", leave);
  map.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    if (!step) return;
    point(row + step[0], column + step[1], true);
    event.preventDefault();
  });
}
