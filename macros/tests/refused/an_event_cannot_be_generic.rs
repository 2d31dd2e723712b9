#[hopline::event(key = "order.created")]
struct Created<T> {
    id: T,
}

#[hopline::event(key = "order.shipped")]
enum Shipped<'a> {
    To(&'a str),
}

fn main() {}
