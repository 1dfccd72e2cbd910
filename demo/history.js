// What was drawn, kept by this browser alone and only when asked to. Runs as js_on_load, with `element` and `trigger`.
// An entry is {text, picture}: the settings as one can paste them, and a thumbnail as a data URL.
const PLACE = 'diffusionfm-history', MOST = 60, SIDE = 96, VEILED = 6;  // pixels wide and tall
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
  part('list').replaceChildren(...(entries ?? []).map((entry, k) => {
    const item = document.createElement('li'), button = document.createElement('button');
    const picture = document.createElement('img');
    const words = entry.text.split('\n')[0], seed = /Seed: (\d+)/.exec(entry.text)?.[1];
    picture.src = entry.picture;
    picture.alt = '';
    button.type = 'button';
    button.title = `${words}, seed ${seed}`;
    button.setAttribute('aria-label', `Restore ${button.title}`);
    button.dataset.entry = k;
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

const remember = async () => {
  const cards = [...document.querySelectorAll('#stage .card:has([data-copy])')];
  if (read() === null || !cards.length) return;
  const drawn = await Promise.all(cards.map(async card => {
    const text = card.querySelector('[data-copy]').dataset.copy, picture = new Image();
    picture.src = card.querySelector('img').src;
    await picture.decode();
    const veiled = card.querySelector('.veil input:not(:checked)');  // of such no more is kept than a blur
    return {text, picture: thumbnail(picture, veiled ? VEILED : SIDE)};
  }));
  if (read() === null) return;  // unticked meanwhile
  const known = new Set(drawn.map(entry => entry.text));
  write([...drawn, ...read().filter(entry => !known.has(entry.text))].slice(0, MOST));
  show();
};

part('wanted').addEventListener('change', event => {
  if (event.target.checked) { write([]); remember(); } else write(null);
  show();
});
element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.entry) trigger('click', {value: read()[button.dataset.entry].text});
  else if (confirm(`Forget ${read().length} pictures of this list?`)) { write([]); show(); part('wanted').focus(); }
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

const look = () => element.isConnected ? remember() : document.removeEventListener('stage', look);
document.addEventListener('stage', look);  // create.js tells of what comes to stand there
show();
