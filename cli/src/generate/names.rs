//! Names in generated code. What comes from a schema gets into code only as an identifier that is made here, or as the text
//! of a literal.

use std::collections::BTreeSet;

/// The words of a name: `unitPrice`, `unit_price` and `unit-price` are the same two.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut was_lower = false;
    for c in name.chars() {
        if !c.is_ascii_alphanumeric() || (c.is_ascii_uppercase() && was_lower) {
            words.push(String::new());
        }
        was_lower = c.is_ascii_lowercase() || c.is_ascii_digit();
        if c.is_ascii_alphanumeric() {
            words.last_mut().expect("there is one").push(c);
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// The name of a type: `OrderLine`.
pub(super) fn camel(name: &str) -> String {
    let upper = |word: String| word[..1].to_ascii_uppercase() + &word[1..];
    begun(words(name).into_iter().map(upper).collect(), "Type")
}

/// The name of a method, a parameter or a field: `order_line`.
pub(super) fn snake(name: &str) -> String {
    begun(words(name).join("_").to_ascii_lowercase(), "value")
}

/// The same beginning with a letter. `what` stands before a digit, and for nothing.
fn begun(name: String, what: &str) -> String {
    let has_letter = name.starts_with(|c: char| c.is_ascii_alphabetic());
    if has_letter { name } else { format!("{what}{name}") }
}

/// Names that are taken in one place.
pub(super) struct Taken(BTreeSet<String>);

impl Taken {
    pub(super) fn new(taken: &[&str]) -> Self {
        Self(taken.iter().map(|name| (*name).to_owned()).collect())
    }

    /// This name if it is free, and otherwise the same with the first number after it that is. It is taken from now on.
    pub(super) fn take(&mut self, name: String) -> String {
        let numbered = (2..).map(|number| format!("{name}{number}"));
        let free = std::iter::once(name.clone()).chain(numbered).find(|name| !self.0.contains(name));
        let free = free.expect("there are more numbers than names");
        self.0.insert(free.clone());
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_becomes_an_identifier() {
        for (text, type_name, name) in [
            ("OrderLine", "OrderLine", "order_line"),
            ("unitPrice", "UnitPrice", "unit_price"),
            ("unit-price", "UnitPrice", "unit_price"),
            ("Page<Line>", "PageLine", "page_line"),
            ("__init__", "Init", "init"),
            ("2nd", "Type2nd", "value2nd"),
            ("\");\nimport os", "ImportOs", "import_os"),
            ("ö", "Type", "value"),
            ("", "Type", "value"),
        ] {
            assert_eq!((camel(text).as_str(), snake(text).as_str()), (type_name, name), "{text}");
        }
        let mut taken = Taken::new(&["self"]);
        assert_eq!(["self", "a", "a", "a"].map(|name| taken.take(name.to_owned())), ["self2", "a", "a2", "a3"]);
    }
}
