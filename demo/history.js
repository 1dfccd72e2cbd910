// What was drawn, kept by this browser alone and only when asked to. Runs as js_on_load, with `element` and `trigger`.
// An entry is {text, picture}: the settings as one can paste them, and a thumbnail as a data URL.
const PLACE = 'diffusionfm-history', DONE = 'diffusionfm-remembered';
const MOST = 60, SIDE = 96, VEILED = 6;  // pixels wide and tall
const part = name => element.querySelector(`[data-part=${name}]`);

const read = () => { try { return JSON.parse(localStorage.getItem(PLACE)); } catch { return null; } };
const write = entries => {  // null: not wanted
  try {
    if (entries) localStorage.setItem(PLACE, JSON.stringify(entries)); else localStorage.removeItem(PLACE);
  } catch {
    if (entries?.length) write(entries.slice(0, entries.length / 2));  // the browser's room is full
  }
};

const show = () => {
  const entries = read();
  part('wanted').checked = entries !== null;
  part('clear').hidden = !entries?.length;
  part('list').replaceChildren(...(entries ?? []).map(entry => {
    const item = document.createElement('li'), button = document.createElement('button');
    const picture = document.createElement('img');
    const words = entry.text.split('\n')[0], seed = /Seed: (\d+)/.exec(entry.text)?.[1];
    picture.src = entry.picture;
    picture.alt = '';
    button.type = 'button';
    button.title = `${words}, seed ${seed}`;
    button.setAttribute('aria-label', `Restore ${button.title}`);
    button.addEventListener('click', () => trigger('click', {value: entry.text}));
    button.append(picture);
    item.append(button);
    return item;
  }));
};

const thumbnail = (picture, side) => {
  const canvas = document.createElement('canvas');
  const scale = side / Math.max(picture.naturalWidth, picture.naturalHeight);
  canvas.width = Math.max(1, picture.naturalWidth * scale);
  canvas.height = Math.max(1, picture.naturalHeight * scale);
  const pen = canvas.getContext('2d');
  pen.imageSmoothingQuality = 'high';
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL('image/webp', 0.8);
};

// A set of pictures is remembered once, so Clear is for good: `DONE` is the last one of this browser's tab, where a
// reload shows it again. Pictures drawn anew are another set, even if they are the same.
let shown = false;
const remember = async wanted => {
  const cards = [...document.querySelectorAll('#stage .card:has([data-copy])')];
  if (!cards.length && shown) sessionStorage.removeItem(DONE);
  shown = cards.length > 0;
  if (read() === null || !shown) return;
  const texts = cards.map(card => card.querySelector('[data-copy]').dataset.copy), set = JSON.stringify(texts);
  const fresh = wanted || sessionStorage.getItem(DONE) !== set;
  sessionStorage.setItem(DONE, set);
  const pictures = await Promise.all(cards.map(async card => {
    const picture = new Image();
    picture.src = card.querySelector('img').src;
    await picture.decode();
    const veiled = card.querySelector('.veil input:not(:checked)');  // of such no more is kept than a blur
    return thumbnail(picture, veiled ? VEILED : SIDE);
  }));
  const entries = read();
  if (entries === null) return;  // unticked meanwhile
  const drawn = new Map(texts.map((text, k) => [text, {text, picture: pictures[k]}]));
  if (fresh) write([...drawn.values(), ...entries.filter(entry => !drawn.has(entry.text))].slice(0, MOST));
  else write(entries.map(entry => drawn.get(entry.text) ?? entry));  // a veil may have been lifted
  show();
};

part('wanted').addEventListener('change', event => {
  if (event.target.checked) { write(read() ?? []); remember(true); } else write(null);
  show();
});
part('clear').addEventListener('click', () => {
  if (!confirm(`Forget ${part('list').children.length} pictures of this list?`)) return;
  write(read() && []);
  show();
  part('wanted').focus();
});

// Settings that were copied, here or in another studio, unpack themselves when they are pasted as a prompt.
const paste = event => {
  if (!element.isConnected) return document.removeEventListener('paste', paste);
  const text = event.clipboardData?.getData('text') ?? '';
  if (!event.target.closest?.('#prompt') || !/\nSteps: \d/.test(text)) return;
  event.preventDefault();
  trigger('click', {value: text});
};
document.addEventListener('paste', paste);

const look = () => element.isConnected ? remember(false) : document.removeEventListener('stage', look);
document.addEventListener('stage', look);  // create.js tells of what comes to stand there
const others = () => element.isConnected ? show() : window.removeEventListener('storage', others);
window.addEventListener('storage', others);  // another tab of this browser wrote
show();
