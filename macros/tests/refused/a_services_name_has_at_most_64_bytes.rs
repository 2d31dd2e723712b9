#[hopline::service(name = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx")]
trait Demo {
    async fn put(&self);
}

fn main() {}
