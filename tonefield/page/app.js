() => {
  // Pictures of sounds that one can listen from and paint on. Gradio calls this once, when the page is there.

  // The field with the spans is where they are kept; what is painted follows it, whoever writes there.
  const field = () => document.querySelector('#spans textarea, #spans input');
  const spans = () => [...field().value.matchAll(/([\d.]+):([\d.]+)/g)].map(span => [+span[1], +span[2]]);
  const paint = () => {
    const picture = document.querySelector('#sound .picture');
    if (!picture || !field()) return;
    picture.querySelectorAll('.span').forEach(mark => mark.remove());
    for (const [start, end] of spans()) {
      const mark = document.createElement('div');
      mark.className = 'span';
      mark.style.left = 100 * start / picture.dataset.seconds + '%';
      mark.style.width = 100 * (end - start) / picture.dataset.seconds + '%';
      picture.append(mark);
    }
  };
  const write = list => {
    const joined = [];
    for (const [start, end] of list.sort((a, b) => a[0] - b[0])) {
      const last = joined.at(-1);
      if (last && start <= last[1]) last[1] = Math.max(last[1], end);
      else joined.push([start, end]);
    }
    field().value = joined.map(span => span.map(time => +time.toFixed(3)).join(':')).join(' ');
    field().dispatchEvent(new Event('input', {bubbles: true}));  // for gradio to take notice
  };
  document.addEventListener('input', event => { if (event.target === field()) paint(); });

  // Drag to mark, tap a mark to remove it, tap elsewhere to listen from there
  let drag = null;
  const far = event => Math.abs(event.clientX - drag.x) >= 5;
  document.addEventListener('pointerdown', event => {
    const picture = event.target.closest('.take .picture');
    if (!picture || event.button) return;
    const box = picture.getBoundingClientRect();
    const at = x => Math.min(1, Math.max(0, (x - box.left) / box.width)) * picture.dataset.seconds;
    drag = {x: event.clientX, at, picture, marks: picture.closest('#sound') && spans()};
    event.preventDefault();
  });
  document.addEventListener('pointermove', event => {
    if (!drag?.marks || !far(event)) return;
    const mark = [drag.at(drag.x), drag.at(event.clientX)].sort((a, b) => a - b);
    write([...drag.marks.map(span => [...span]), mark]);
  });
  document.addEventListener('pointercancel', () => { drag = null; });  // the page is scrolled instead
  document.addEventListener('pointerup', event => {
    if (drag && !far(event)) {
      const time = drag.at(drag.x), audio = drag.picture.closest('.take').querySelector('audio');
      const others = drag.marks?.filter(([start, end]) => time < start || end < time);
      if (others && others.length < drag.marks.length) write(others);
      else {
        audio.currentTime = time;
        audio.play();
      }
    }
    drag = null;
  });

  // A line runs through the picture of what is heard
  const run = audio => {
    const line = audio.closest('.take').querySelector('.line');
    line.style.opacity = audio.paused && !audio.currentTime ? 0 : 0.9;
    line.style.left = 100 * audio.currentTime / (audio.duration || 1) + '%';
    if (!audio.paused) requestAnimationFrame(() => run(audio));
  };
  const onSound = (name, act) => document.addEventListener(name, event => {
    if (event.target.matches('.take audio')) act(event.target);
  }, true);
  onSound('play', audio => {
    document.querySelectorAll('.take audio').forEach(other => { if (other !== audio) other.pause(); });
    run(audio);
  });
  onSound('seeked', run);
  onSound('ended', audio => { audio.currentTime = 0; });
  onSound('loadeddata', audio => {  // a new sound; on a phone it lies beyond the edge
    if (audio.closest('#sound')) audio.closest('.take').scrollIntoView({block: 'nearest', behavior: 'smooth'});
    paint();
  });
}
