// Equations only in a page's own text and in titles, so that other dollars stay dollars.
window.MathJax = {
  tex: { inlineMath: [['$', '$'], ['\\(', '\\)']], displayMath: [['$$', '$$'], ['\\[', '\\]']] },
  options: { ignoreHtmlClass: 'md-container', processHtmlClass: 'arithmatex|jp-RenderedMarkdown|md-ellipsis' },
}
// A cell marked `code-fold` shows its code when asked.
for (const code of document.querySelectorAll('.celltag_fold .jp-Cell-inputWrapper')) {
  const fold = document.createElement('details')
  fold.innerHTML = '<summary>Code</summary>'
  code.replaceWith(fold)
  fold.append(code)
}
