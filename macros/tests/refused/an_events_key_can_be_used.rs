#[hopline::event(key = "order.*")]
struct Wildcard;

#[hopline::event(key = "order..created")]
struct EmptyWord;

#[hopline::event(key = "")]
struct Empty;

#[hopline::event(key = 7)]
struct Number;

fn main() {}
