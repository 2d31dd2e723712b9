//! Names and types as people write them, for names on the wire and for error messages.

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};

/// A trait's name in snake case: `KeyValueStore` becomes `key_value_store`, and `HTTPServer` becomes `http_server`.
pub(crate) fn snake_case(name: &str) -> String {
    let chars: Vec<char> = name.chars().collect();
    let mut snake = String::new();
    for (i, &c) in chars.iter().enumerate() {
        let before = i.checked_sub(1).map(|i| chars[i]);
        let next_is_lowercase = chars.get(i + 1).is_some_and(|c| c.is_lowercase());
        let starts_word = before.is_some_and(|before| before != '_' && (!before.is_uppercase() || next_is_lowercase));
        if c.is_uppercase() && starts_word {
            snake.push('_');
        }
        snake.extend(c.to_lowercase());
    }
    snake
}

/// A type as people write it: `Vec<u8>`. Printing its tokens would leave spaces: `Vec < u8 >`.
pub(crate) fn type_text(tokens: TokenStream) -> String {
    let mut text = String::new();
    write(tokens, &mut text);
    text
}

fn write(tokens: TokenStream, text: &mut String) {
    let mut arrow = false;
    for token in tokens {
        match token {
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::None => ("", ""),
                };
                text.push_str(open);
                write(group.stream(), text);
                text.push_str(close);
            }
            TokenTree::Punct(punct) => match punct.as_char() {
                '-' if punct.spacing() == Spacing::Joint => {
                    text.push_str(" -");
                    arrow = true;
                }
                '>' if arrow => {
                    text.push_str("> ");
                    arrow = false;
                }
                c @ (',' | ';') => text.extend([c, ' ']),
                c @ ('+' | '=') => text.extend([' ', c, ' ']),
                c => text.push(c),
            },
            word @ (TokenTree::Ident(_) | TokenTree::Literal(_)) => {
                let word = word.to_string();
                // A word after a word needs a space. So does `as`, which alone can follow a `>`: `<Vec<u8> as
                // Iterator>::Item`.
                if text.ends_with(|c: char| c.is_alphanumeric() || c == '_') || word == "as" {
                    text.push(' ');
                }
                text.push_str(&word);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_named_like_its_trait_in_snake_case() {
        for (name, snake) in [
            ("Calculator", "calculator"),
            ("KeyValueStore", "key_value_store"),
            ("HTTPServer", "http_server"),
            ("Http2Server", "http2_server"),
            ("StoreV2", "store_v2"),
            ("Already_Snake", "already_snake"),
            ("lower", "lower"),
            ("A", "a"),
        ] {
            assert_eq!(snake_case(name), snake);
        }
    }

    #[test]
    fn types_are_written_without_odd_spaces() {
        for text in [
            "Vec<u8>",
            "()",
            "(i64, String)",
            "[u8; 32]",
            "HashMap<String, Vec<Option<u8>>>",
            "std::collections::BTreeMap<u8, u8>",
            "<Vec<u8> as IntoIterator>::Item",
            "Box<dyn Fn(u8) -> Vec<u8> + Send>",
            "Box<dyn Iterator<Item = u8>>",
            "Array<{ N }>",
        ] {
            let tokens = text.parse().expect("each is a type");
            let expected = text.replace("{ N }", "{N}");
            assert_eq!(type_text(tokens), expected);
        }
    }
}
