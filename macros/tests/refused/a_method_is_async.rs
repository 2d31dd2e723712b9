#[hopline::service]
trait Demo {
    fn put(&self);
}

fn main() {}
