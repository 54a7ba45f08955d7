"""The wording of questions, by what they ask and in which language."""

UNANSWERABLE = {
    "en": "The page does not say.",
    "de": "Das steht nicht auf der Seite.",
    "fr": "La page ne le dit pas.",
    "es": "La página no lo dice.",
    "ru": "На странице этого нет.",
    "zh": "页面上没有说明。",
}
"""The answer to what the page does not tell."""
YES = {"en": "Yes", "de": "Ja", "fr": "Oui", "es": "Sí", "ru": "Да", "zh": "是"}
NO = {"en": "No", "de": "Nein", "fr": "Non", "es": "No", "ru": "Нет", "zh": "否"}

# They quote what the page prints and ask for a place beside it: so they are right whatever the
# words mean, which a program cannot know.
TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "cell": {
        "en": (
            "In the row where {name} is '{key}', what is {column}?",
            "In the table, what stands under '{column}' in the row of '{key}'?",
            "What does the table give under '{column}' where '{name}' is '{key}'?",
        ),
        "de": (
            "Was steht in der Tabelle unter „{column}“ in der Zeile von „{key}“?",
            "In der Zeile, in der „{name}“ „{key}“ ist: Was steht unter „{column}“?",
        ),
        "fr": (
            "Dans le tableau, que lit-on sous « {column} » à la ligne de « {key} » ?",
            "Dans la ligne où « {name} » est « {key} », que lit-on sous « {column} » ?",
        ),
        "es": (
            "En la tabla, ¿qué aparece bajo «{column}» en la fila de «{key}»?",
            "En la fila donde «{name}» es «{key}», ¿qué aparece bajo «{column}»?",
        ),
        "ru": (
            "Что указано в таблице в столбце «{column}» в строке «{key}»?",
            "В строке, где «{name}» — «{key}», что указано в столбце «{column}»?",
        ),
        "zh": (
            "表格中，“{key}”一行的“{column}”是什么？",
            "在“{name}”为“{key}”的那一行，“{column}”一栏写的是什么？",
        ),
    },
    "beside": {
        "en": (
            "In the table, what stands beside '{key}'?",
            "Which entry of the table is to the right of '{key}'?",
        ),
        "de": ("Was steht in der Tabelle neben „{key}“?",),
        "fr": ("Dans le tableau, que lit-on à côté de « {key} » ?",),
        "es": ("En la tabla, ¿qué aparece junto a «{key}»?",),
        "ru": ("Что стоит в таблице рядом с «{key}»?",),
        "zh": ("表格中，“{key}”旁边写的是什么？",),
    },
    "is_cell": {
        "en": (
            "Does the table give '{value}' under '{column}' in the row of '{key}'?",
            "In the row of '{key}', does '{value}' stand under '{column}'?",
        ),
        "de": ("Steht in der Tabelle in der Zeile von „{key}“ unter „{column}“ „{value}“?",),
        "fr": ("Dans le tableau, lit-on « {value} » sous « {column} » à la ligne de « {key} » ?",),
        "es": ("En la tabla, ¿aparece «{value}» bajo «{column}» en la fila de «{key}»?",),
        "ru": ("Указано ли в таблице в строке «{key}» в столбце «{column}» «{value}»?",),
        "zh": ("表格中，“{key}”一行的“{column}”是“{value}”吗？",),
    },
    "num_rows": {
        "en": (
            "How many rows does the table have, without its head?",
            "Below its head, how many rows are in the table?",
        ),
        "de": ("Wie viele Zeilen hat die Tabelle ohne die Kopfzeile?",),
        "fr": ("Combien de lignes le tableau a-t-il, sans l'en-tête ?",),
        "es": ("¿Cuántas filas tiene la tabla, sin la cabecera?",),
        "ru": ("Сколько строк в таблице, не считая заголовка?",),
        "zh": ("除表头外，表格有多少行？",),
    },
    "num_columns": {
        "en": (
            "How many columns does the table have?",
            "Into how many columns is the table divided?",
        ),
        "de": ("Wie viele Spalten hat die Tabelle?",),
        "fr": ("Combien de colonnes le tableau a-t-il ?",),
        "es": ("¿Cuántas columnas tiene la tabla?",),
        "ru": ("Сколько столбцов в таблице?",),
        "zh": ("表格有多少列？",),
    },
    "num_bullets": {
        "en": (
            "How many lines on this page begin with '{bullet}'?",
            "Count the lines that start with '{bullet}'.",
        ),
        "de": ("Wie viele Zeilen auf dieser Seite beginnen mit „{bullet}“?",),
        "fr": ("Combien de lignes de cette page commencent par « {bullet} » ?",),
        "es": ("¿Cuántas líneas de esta página empiezan con «{bullet}»?",),
        "ru": ("Сколько строк на этой странице начинается с «{bullet}»?",),
        "zh": ("本页有多少行以“{bullet}”开头？",),
    },
    # Keys stand without their colons in the fields.
    "value": {
        "en": (
            "What is written after '{key}:'?",
            "What stands after '{key}:' on its line?",
            "Read what comes after '{key}:'.",
        ),
        "de": ("Was steht hinter „{key}:“?", "Lies, was auf „{key}:“ folgt."),
        "fr": ("Que lit-on après « {key} : » ?", "Qu'est-il écrit après « {key} : » ?"),
        "es": ("¿Qué aparece después de «{key}:»?", "¿Qué está escrito después de «{key}:»?"),
        "ru": ("Что написано после «{key}:»?", "Что стоит после «{key}:»?"),
        "zh": ("“{key}：”后面写的是什么？", "请读出“{key}：”后面的内容。"),
    },
    # Also asked of sections that are not on the page: a model learns to say so.
    "title": {
        "en": (
            "What is the title of section {number}?",
            "What is section {number} called?",
            "How is section {number} headed?",
        ),
        "de": ("Wie heißt Abschnitt {number}?", "Welche Überschrift hat Abschnitt {number}?"),
        "fr": (
            "Quel est le titre de la section {number} ?",
            "Comment s'intitule la section {number} ?",
        ),
        "es": (
            "¿Cuál es el título de la sección {number}?",
            "¿Cómo se titula la sección {number}?",
        ),
        "ru": ("Как называется раздел {number}?", "Какой заголовок у раздела {number}?"),
        "zh": ("第 {number} 节的标题是什么？", "{number} 节叫什么？"),
    },
    "number": {
        "en": (
            "Which number has the section '{title}'?",
            "What is the number of the section called '{title}'?",
        ),
        "de": ("Welche Nummer hat der Abschnitt „{title}“?",),
        "fr": ("Quel est le numéro de la section « {title} » ?",),
        "es": ("¿Qué número tiene la sección «{title}»?",),
        "ru": ("Какой номер у раздела «{title}»?",),
        "zh": ("“{title}”一节的编号是多少？",),
    },
    "next_section": {
        "en": (
            "Which section follows section {number} on this page?",
            "What is the heading of the section after {number}?",
        ),
        "de": ("Welcher Abschnitt folgt auf dieser Seite auf Abschnitt {number}?",),
        "fr": ("Quelle section suit la section {number} sur cette page ?",),
        "es": ("¿Qué sección sigue a la sección {number} en esta página?",),
        "ru": ("Какой раздел следует за разделом {number} на этой странице?",),
        "zh": ("本页上，第 {number} 节之后是哪一节？",),
    },
    "has_section": {
        "en": (
            "Does section {number} begin on this page?",
            "Is there a heading of section {number} on the page?",
        ),
        "de": ("Beginnt Abschnitt {number} auf dieser Seite?",),
        "fr": ("La section {number} commence-t-elle sur cette page ?",),
        "es": ("¿Empieza la sección {number} en esta página?",),
        "ru": ("Начинается ли раздел {number} на этой странице?",),
        "zh": ("第 {number} 节是否从本页开始？",),
    },
    "next_heading": {
        "en": (
            "Which heading comes after '{title}'?",
            "What is the next heading below '{title}'?",
        ),
        "de": ("Welche Überschrift kommt nach „{title}“?",),
        "fr": ("Quel titre vient après « {title} » ?",),
        "es": ("¿Qué título viene después de «{title}»?",),
        "ru": ("Какой заголовок идёт после «{title}»?",),
        "zh": ("“{title}”之后的标题是什么？",),
    },
    "caption": {
        "en": (
            "What is the caption of {label}?",
            "What does the caption of {label} say?",
            "What is {label} about, by its caption?",
        ),
        "de": ("Wie lautet die Beschriftung von {label}?", "Was steht als Titel bei {label}?"),
        "fr": ("Quelle est la légende de {label} ?", "Quel titre porte {label} ?"),
        "es": ("¿Cuál es el título de {label}?", "¿Qué dice la leyenda de {label}?"),
        "ru": ("Какая подпись у «{label}»?", "Как озаглавлено «{label}»?"),
        "zh": ("{label}的标题是什么？", "{label}的说明文字是什么？"),
    },
    # "The list", for contents, indices, and lists of tables and figures look alike.
    "entry_page": {
        "en": (
            "On which page is '{title}', by the list?",
            "Which page number does the list give for '{title}'?",
        ),
        "de": ("Auf welcher Seite steht „{title}“ laut Verzeichnis?",),
        "fr": ("À quelle page se trouve « {title} » d'après la table ?",),
        "es": ("¿En qué página está «{title}» según el índice?",),
        "ru": ("На какой странице, судя по оглавлению, находится «{title}»?",),
        "zh": ("根据目录，“{title}”在第几页？",),
    },
    # The printed one: a file's own count of pages cannot be seen.
    "page_number": {
        "en": (
            "Which page number is printed on the page?",
            "What is the number of this page, as printed?",
        ),
        "de": ("Welche Seitenzahl ist aufgedruckt?",),
        "fr": ("Quel numéro de page est imprimé ?",),
        "es": ("¿Qué número de página está impreso?",),
        "ru": ("Какой номер страницы напечатан?",),
        "zh": ("页面上印的页码是多少？",),
    },
    "line_rest": {
        "en": (
            "How does the line go on that begins with '{start}'?",
            "Read the rest of the line after '{start}'.",
        ),
        "de": ("Wie geht die Zeile weiter, die mit „{start}“ beginnt?",),
        "fr": ("Comment continue la ligne qui commence par « {start} » ?",),
        "es": ("¿Cómo sigue la línea que empieza con «{start}»?",),
        "ru": ("Как продолжается строка, которая начинается с «{start}»?",),
        "zh": ("以“{start}”开头的那一行，后面写的是什么？",),
    },
}
"""Templates by kind of question and language; the fields are those of `facts`."""
