"use strict";

// A click on a spectrogram plays its sound, one at a time, and a line moves along.
const sounds = Array.from(document.querySelectorAll(".sound"), (figure) => ({
  figure,
  audio: figure.querySelector("audio"),
  picture: figure.querySelector("img"),
  head: figure.querySelector(".head"),
}));

for (const { figure, audio, picture, head } of sounds) {
  const follow = () => {
    head.style.left = `${(audio.currentTime / (audio.duration || 1)) * picture.offsetWidth}px`;
    if (!audio.paused) requestAnimationFrame(follow);
  };
  figure.querySelector("button").addEventListener("click", () => {
    if (!audio.paused) return audio.pause();
    for (const other of sounds) other.audio.pause();
    audio.currentTime = 0;
    audio.play().catch(() => {}); // another click came first
  });
  audio.addEventListener("play", () => {
    figure.classList.add("playing");
    follow();
  });
  audio.addEventListener("pause", () => figure.classList.remove("playing"));
}
