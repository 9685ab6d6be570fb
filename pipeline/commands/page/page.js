const text = document.getElementById("text");
const query = document.getElementById("query");
const status_ = document.getElementById("status");
const count = document.getElementById("count");
const head = [...document.querySelectorAll("thead th")].slice(1);
const documents = [...document.querySelectorAll("tbody tr")].map((row) => {
  const [name, ...cells] = row.cells;
  return { row, name: name.textContent.toLowerCase(), cells };
});

// Documents without a cell that fits are hidden, and so are other queries; other cells of a document fade.
function filter() {
  const words = text.value.toLowerCase();
  let shown = 0, fitting = 0;
  const isChosen = (number) => query.value === "" || number === Number(query.value);
  head.forEach((cell, number) => { cell.hidden = !isChosen(number); });
  for (const { row, name, cells } of documents) {
    let found = 0;
    cells.forEach((cell, number) => {
      const fits = isChosen(number)
        && (status_.value === "" || cell.dataset.status === status_.value)
        && (name.includes(words) || cell.textContent.toLowerCase().includes(words));
      cell.hidden = !isChosen(number);
      cell.classList.toggle("other", !fits);
      found += fits;
    });
    row.hidden = found === 0;
    shown += found > 0;
    fitting += found;
  }
  count.textContent = `${fitting} answers, ${shown} documents`;
}

for (const control of [text, query, status_]) control.addEventListener("input", filter);
filter();
