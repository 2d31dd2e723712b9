#[hopline::service(foo = 1)]
trait Demo {
    async fn put(&self);
}

fn main() {}
