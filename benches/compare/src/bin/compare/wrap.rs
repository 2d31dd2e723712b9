//! Text in lines of 120 letters, as the guide has them.

const WIDTH: usize = 120;

/// A paragraph or an item of a list, whose further lines are `indent` letters in.
pub(crate) fn wrap(text: &str, indent: usize) -> String {
    let (mut wrapped, mut width) = (String::new(), 0);
    for word in text.split_whitespace() {
        let letters = word.chars().count();
        if width > 0 && width + 1 + letters > WIDTH {
            wrapped.push('\n');
            wrapped.push_str(&" ".repeat(indent));
            width = indent;
        } else if width > 0 {
            wrapped.push(' ');
            width += 1;
        }
        wrapped.push_str(word);
        width += letters;
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_full_and_not_longer() {
        let text = wrap(&"µs ".repeat(100), 2);
        let lines: Vec<_> = text.lines().collect();
        // 40 words of two letters, and what parts them.
        assert_eq!(lines[0].chars().count(), 119);
        assert!(lines[1].starts_with("  µs") && lines[1].chars().count() == 118);
        assert_eq!(text.split_whitespace().count(), 100);
    }

    #[test]
    fn a_word_without_a_break_stays_whole() {
        let word = "a".repeat(200);
        assert_eq!(wrap(&format!("{word} b"), 0), format!("{word}\nb"));
    }
}
