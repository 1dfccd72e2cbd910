// The stage: what its buttons do, and the keys of the tab. Runs as js_on_load, with `element` and `trigger`.
const copy = async text => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.body.appendChild(document.createElement('textarea'));  // a page without https
  area.value = text;
  area.select();
  document.execCommand('copy');
  area.remove();
};

element.addEventListener('click', async event => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.value) trigger('click', {value: button.dataset.value});
  if (!button.dataset.copy) return;
  await copy(button.dataset.copy);
  const said = button.textContent;
  button.textContent = 'Copied';
  setTimeout(() => button.textContent = said, 1500);
});
element.addEventListener('change', () => document.dispatchEvent(new Event('stage')));  // a veil was lifted

const press = id => document.querySelector(`#${id}`)?.click();
const keys = event => {
  if (!element.isConnected) return document.removeEventListener('keydown', keys);
  if (!element.offsetParent || event.defaultPrevented) return;  // another tab is open
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) press('generate');
  if (event.key === 'Escape' && !document.querySelector('#cancel')?.disabled) press('cancel');
};
document.addEventListener('keydown', keys);
const notice = changes => {  // of a button no more than its word changes
  if (changes.some(change => !change.target.closest('button'))) document.dispatchEvent(new Event('stage'));
};
new MutationObserver(notice).observe(element, {childList: true, subtree: true});
