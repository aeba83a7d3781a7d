//! Rules for functions: their length, and the names of their type parameters.

use std::collections::BTreeSet;

use super::{Source, code, none, sources};

/// Limit on the lines of a function, its signature included: what a screen shows. clippy's `too_many_lines` allows
/// 100 lines of a body, and does not count comments.
const FUNCTION_LINES_MAX: usize = 70;
/// Type parameters of one letter that every reader knows: a type, a kind of stored objects and an error.
const LETTERS: [&str; 3] = ["T", "K", "E"];
/// Bounds of the only other letter: a value that holds a host, and a handler of requests.
const BOUNDS_OF_H: [&str; 2] = ["H: Host", "H: Handler"];

/// The first and the last line of each function, with its name. Relies on the layout that rustfmt gives.
fn functions(text: &str) -> Vec<(usize, usize, String)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else { continue };
        let indent = line.len() - line.trim_start().len();
        let is_end = |line: &&str| {
            line.len() - line.trim_start().len() == indent
                && (line.trim() == "}" || (line.trim_start().starts_with(')') && line.ends_with(';')))
        };
        // A function on one line, or one without a body.
        if line.ends_with(['}', ';']) {
            continue;
        }
        if let Some(length) = lines[at..].iter().position(is_end) {
            found.push((at + 1, at + 1 + length, name.to_owned()));
        }
    }
    found
}

/// Returns the name of the function that a line declares.
fn function_name(line: &str) -> Option<&str> {
    let (before, rest) = line.trim_start().split_once("fn ")?;
    let is_modifier = |word: &str| {
        ["pub", "async", "const", "unsafe", "extern", "\"C\""].contains(&word) || word.starts_with("pub(")
    };
    let name = rest.split(['(', '<']).next().filter(|name| !name.is_empty())?;
    let is_name = name.chars().all(|character| character.is_alphanumeric() || character == '_');
    (is_name && before.split_whitespace().all(is_modifier)).then_some(name)
}

#[test]
fn functions_fit_a_screen() {
    let all = sources();
    let mut count = 0;
    let mut findings = Vec::new();
    for file in &all {
        for (first, last, name) in functions(&file.text) {
            count += 1;
            let lines = last - first + 1;
            if lines > FUNCTION_LINES_MAX {
                let path = &file.path;
                findings.push(format!(
                    "{path}:{first} {name} has {lines} lines; {FUNCTION_LINES_MAX} are allowed"
                ));
            }
        }
    }
    assert!(count > 1000, "only {count} functions were recognised");
    none(findings);
}

#[test]
fn a_function_ends_at_its_own_brace() {
    let text = "pub(crate) async fn a<T>(\n    b: T,\n) -> T {\n    if b {\n    }\n}\n\ntrait C {\n    fn d(\n        \
                &self,\n    );\n    fn e(&self) {\n        1\n    }\n}\n// fn f(\n";
    let found = functions(text);
    let expected = [(1, 6, "a"), (9, 11, "d"), (12, 14, "e")];
    assert_eq!(found, expected.map(|(first, last, name)| (first, last, name.to_owned())));
}

/// Returns the type parameters that the code declares, each with its line.
fn type_parameters(file: &Source) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let lines: Vec<(usize, &str)> = code(&file.text).collect();
    for (at, (number, line)) in lines.iter().enumerate() {
        let Some(start) = list_start(line) else { continue };
        let text: String = std::iter::once(&line[start..])
            .chain(lines[at + 1..].iter().take(10).map(|(_, line)| *line))
            .collect::<Vec<_>>()
            .join(" ");
        for parameter in parameters(&text) {
            let name = parameter.split([':', '=']).next().unwrap_or_default().trim();
            if !name.starts_with('\'') && !name.starts_with("const ") {
                found.push((*number, name.to_owned()));
            }
        }
    }
    found
}

/// Returns the position behind the bracket that opens the type parameters of a declaration.
fn list_start(line: &str) -> Option<usize> {
    let declared = ["fn ", "struct ", "enum ", "trait ", "type "].iter().find_map(|word| {
        let name = line.find(word)? + word.len();
        let length = line[name..].find(|character: char| !character.is_alphanumeric() && character != '_')?;
        (length > 0 && line[name + length..].starts_with('<')).then_some(name + length + 1)
    });
    let implemented = line.trim_start().strip_prefix("impl<").map(|rest| line.len() - rest.len());
    declared.or(implemented)
}

/// Splits a list of type parameters, which ends where its bracket is closed.
fn parameters(text: &str) -> Vec<String> {
    let (mut depth, mut last) = (0, ' ');
    let mut list = vec![String::new()];
    for character in text.chars() {
        match character {
            '<' | '(' => depth += 1,
            // The arrow of a function's type closes nothing.
            '>' if last == '-' => {}
            '>' if depth == 0 => break,
            '>' | ')' => depth -= 1,
            ',' if depth == 0 => list.push(String::new()),
            _ => {}
        }
        if !(character == ',' && depth == 0) {
            list.last_mut().expect("it has one").push(character);
        }
        last = character;
    }
    list.into_iter()
        .map(|parameter| parameter.trim().to_owned())
        .filter(|parameter| !parameter.is_empty())
        .collect()
}

#[test]
fn type_parameters_have_names() {
    let all = sources();
    let mut names = BTreeSet::new();
    let mut findings = Vec::new();
    for file in &all {
        // A letter that has no bound in one declaration has one in the same file.
        let is_h_known = BOUNDS_OF_H.iter().any(|bound| file.text.contains(bound));
        for (number, name) in type_parameters(file) {
            let is_known = LETTERS.contains(&name.as_str()) || (name == "H" && is_h_known);
            if name.len() == 1 && !is_known {
                findings.push(format!("{}:{number} {name}", file.path));
            }
            names.insert(name);
        }
    }
    assert!(names.contains("K") && names.len() > 5, "{names:?}");
    none(findings);
}

#[test]
fn type_parameters_are_recognised() {
    let text = "impl<'a, Q: Fn(u8, u8) -> Vec<u8>, R> A for B<Q> {\n    fn c<\n        S,\n    >(&self) {}\n}\nstruct D<P = \
                Vec<u8>>(P);\nfn e<const N: usize>() {}\n";
    let source = Source { path: "x.rs".to_owned(), text: text.to_owned() };
    let expected = [(1, "Q"), (1, "R"), (2, "S"), (6, "P")];
    assert_eq!(type_parameters(&source), expected.map(|(number, name)| (number, name.to_owned())));
}
