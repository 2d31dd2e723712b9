#[hopline::service]
struct Demo {
    field: u8,
}

fn main() {}
